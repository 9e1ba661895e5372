"""The entry point of `python -m perpetune` and of `accelerate launch -m perpetune`."""

from perpetune.cli import main

if __name__ == "__main__":
    main()
