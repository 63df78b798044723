"""`mmtx report`: a finished run on one page."""

import argparse

from mmtx.commands import evaluate
from mmtx.commands.arguments import add_model_options
from mmtx.files import user_path, write_file


def add(commands) -> None:
    parser = commands.add_parser("report", help="write a run as one HTML page: curves, metrics, samples, configuration")
    parser.add_argument("folder", help="output folder of mmtx fit")
    parser.add_argument("--file", type=user_path, default=None, help="HTML file to write; default: report.html in that folder")
    parser.add_argument("--evaluate", action="store_true", help="caption the run's data.validation with its finished model, as "
                        "mmtx evaluate does; the result is kept as evaluation.txt in the folder, and later reports show it, too")
    add_model_options(parser, model=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from mmtx.run_page import EVALUATION, run_page

    folder = user_path(options.folder)
    files = {}
    if options.evaluate:
        parser = argparse.ArgumentParser()
        evaluate.add(parser.add_subparsers())
        config = folder / "metrics" / "config.yaml"
        asked = parser.parse_args(["evaluate", f"--config={config}", f"--model={folder / 'model'}", "--show=16"])
        asked.device = options.device
        files[folder / EVALUATION] = "\n".join(evaluate.evaluation(asked)).strip("\n") + "\n"
    files[options.file or folder / "report.html"] = run_page(folder, files.get(folder / EVALUATION))
    for file, text in files.items():
        write_file(file, text.encode())
        print(file)
