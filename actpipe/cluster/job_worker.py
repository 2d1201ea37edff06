"""The worker of a batch job: it takes the arguments with which dask-jobqueue starts workers, and leaves in order."""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentParser

from distributed import Security

from actpipe.cluster.working import work_for
from actpipe.errors import ClusterError

_LEFT_TO_OTHERS = ("--nthreads", "--memory-limit", "--death-timeout", "--protocol", "--local-directory")
"""What dask-jobqueue says too, and the batch system, the scheduler's address or `work_for` settle."""


def main(arguments: list[str] | None = None) -> None:
    """Do parts until the scheduler ends, or the batch system asks the job to."""
    parser = ArgumentParser(prog="python -m actpipe.cluster.job_worker", description=__doc__, allow_abbrev=False)
    parser.add_argument("scheduler")
    for option in ("--name", "--interface", "--tls-ca-file", "--tls-cert", "--tls-key"):
        parser.add_argument(option)
    for option in _LEFT_TO_OTHERS:
        parser.add_argument(option, help=SUPPRESS)
    given = parser.parse_args(arguments)
    security = None
    if given.tls_ca_file is not None:
        security = Security(
            tls_ca_file=given.tls_ca_file,
            tls_worker_cert=given.tls_cert,
            tls_worker_key=given.tls_key,
            require_encryption=True,
        )
    try:
        work_for(given.scheduler, name=given.name, seconds=None, interface=given.interface, security=security)
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
