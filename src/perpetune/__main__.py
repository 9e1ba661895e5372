"""`python -m perpetune`, and what `accelerate launch -m perpetune` runs."""

from perpetune.cli import main

if __name__ == "__main__":
    main()
