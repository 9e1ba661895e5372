"""Protection inside other people's trainers."""
