"""`python -m actpipe` is `actpipe`."""

from actpipe.cli import main

main()
