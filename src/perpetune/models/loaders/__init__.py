"""Loaders of backbones: `timm:NAME[.TAG]`, `hf:ID_OR_FOLDER`, `openclip:NAME.TAG`, `folder:PATH`, `perpetune:micro`.

The prefix names a loader: a function that turns the text after the colon into a frozen `Backbone` on the CPU. Its
keyword-only arguments are its options in a recipe. `hf` and `folder` look into the checkpoint and call the loader of
its kind of model, which takes only its own options.
"""
