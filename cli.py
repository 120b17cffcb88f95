"""What the commands share: bad flags, like every other bad input, end in one sentence and exit code 2."""

import argparse


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of its errors."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists what there is.\n")
