"""`qrank` and `python -m qrank`: the command line as a process."""

import signal
import sys

from qrank.system.signals import Ended, die_of


def main() -> None:
    """Run the command line."""
    try:
        from qrank.cli import main as command  # takes most of the startup time
    except KeyboardInterrupt:
        end = Ended(signal.SIGINT)
        if sys.stderr is not None:
            sys.stderr.write(f"qrank: {end.message}\n")
        die_of(end)
        raise end from None
    command()


if __name__ == "__main__":
    main()
