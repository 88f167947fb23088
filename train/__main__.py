"""``python -m train --config configs/cifar10/hybrid_vin_rope.yaml --data.root DIR``"""

from __future__ import annotations

import difflib
import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser

from .config import RunConfig
from .loop import Run


class Parser(ArgumentParser):
    """One sentence for a mistake, with the nearest option, in place of the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = {key for key, _ in self.get_defaults().items()} - {"config"}
        for word in re.findall(r"[\w.]+", message.split("\n")[0]):
            near = difflib.get_close_matches(word, known - {word}, n=1, cutoff=0.8)
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
                break
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str] | None = None) -> RunConfig:
    """The configuration from YAML files and the command line, the later over the earlier."""
    parser = Parser(
        prog="python -m train",
        description="Train a model, choose on validation, test once.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    parser.add_class_arguments(RunConfig, as_group=False)
    namespace = parser.parse_args(arguments)
    namespace.pop("config")
    return RunConfig(**parser.instantiate(namespace).as_dict())


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    try:
        run = Run(config)
        test = run.fit()
    except (ValueError, OSError) as error:
        # one that crossed from a worker process brings its traceback along
        sentence = str(error).split("ValueError: ")[-1].strip()
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; each epoch's weights are in the run's folder", file=sys.stderr)
        raise SystemExit(130) from None
    if run.accelerator.is_main_process:
        print(f"test top-1 {test.top1:.2%}, top-5 {test.top5:.2%}; all of it in {run.folder}")


if __name__ == "__main__":
    main()
