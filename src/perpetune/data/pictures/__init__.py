"""Pictures: the sources that read them, and the view that turns them into a model's input."""
