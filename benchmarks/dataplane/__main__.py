"""`python -m benchmarks.dataplane`."""

from benchmarks.dataplane.command import main

if __name__ == "__main__":
    main()
