"""Draws one page on a training run: python -m plt_jax.training.report RUN [--out FILE]."""

from plt_jax.commands.parser import CommandParser


def main() -> None:
    parser = CommandParser(
        prog="python -m plt_jax.training.report",
        description="Write one HTML page on a training run: its progress, its speed, and signs of "
        "problems. The run may still be training.",
    )
    parser.add_argument("path", metavar="RUN", help="a run directory")
    parser.add_argument("--out", metavar="FILE", help="default RUN/report.html")
    arguments = parser.parse_args()
    from plt_jax.reports.run_page import write_report

    print(f"written to {write_report(arguments.path, arguments.out)}")
