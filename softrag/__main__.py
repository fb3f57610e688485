"""`python -m softrag` is the `softrag` command."""

if __name__ == "__main__":
    from softrag.cli import main

    main()
