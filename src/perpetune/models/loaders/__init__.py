"""Where backbones come from: `timm:NAME[.TAG]`, `hf:ID_OR_FOLDER`, `folder:PATH`, `perpetune:micro`.

A prefix names a loader: a function from what stands behind the colon to a `Backbone`, on the CPU and frozen. Its
keyword-only arguments are its options in a recipe. `hf` and `folder` look into the checkpoint and hand over to the
loader of its kind of model, which says in its turn what it takes.
"""
