"""Export runs for other programs: ``python -m train export RUN --onnx FILE`` or ``--hub DIR``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

import vision_xformer as vx

from .atomic import read_json, read_yaml
from .cli import command_text
from .commands import output_file, read_run
from .html import Table
from .model import is_converted, load_model
from .recipes import import_modules
from .text import escaped


def export(
    folder: Path, onnx: Path | None, hub: Path | None, half: bool, license: str | None
) -> str:
    """Write the best weights of a run to an ONNX file, or to a folder for the Hugging Face Hub.

    Args:
        folder: folder of the run.
        onnx: the ONNX file to write.
        hub: the folder to write for the Hub, new or from an earlier export.
        half: whether the ONNX file is in float16.
        license: license of the weights, for the model card.

    Returns:
        A sentence that says what was written.

    Raises:
        ValueError: for options that do not fit, or a model that cannot be exported.
    """
    if (onnx is None) == (hub is None):
        raise ValueError("export needs either --onnx FILE or --hub DIR")
    if half and onnx is None:
        raise ValueError("--half is an option of --onnx")
    if license is not None and hub is None:
        raise ValueError("--license is an option of --hub")
    import_modules(read_yaml(folder / "config.yaml").get("imports", ""))
    model, sizes = load_model(folder / "best.safetensors")
    classes: list[str] = read_json(folder / "classes.json", list)
    known: Any = getattr(model, "pretrained_cfg", {})
    model.pretrained_cfg = {**known, "label_names": classes}  # type: ignore[assignment]
    if onnx is not None:
        shape = (sizes.channels, sizes.image_size, sizes.image_size)
        difference = vx.export_onnx(
            model, output_file(onnx, "--onnx"), half=half, input_shape=shape
        )
        return escaped(
            f"wrote {onnx}; in onnxruntime, its logits differ by at most {difference:.1e} from "
            "those of the model"
        )
    assert hub is not None
    checked = _publishable(model, folder)
    earlier = (hub / "config.json").is_file()
    if hub.exists() and not (hub.is_dir() and (earlier or not any(hub.iterdir()))):
        raise ValueError(f"--hub {hub} must be a new folder, or one of an earlier export")
    checked.save_pretrained(hub, card=_card(checked, read_run(folder), license))
    return escaped(f"wrote {hub}; upload it with: hf upload USER/NAME {hub}")


def _publishable(model: nn.Module, folder: Path) -> vx.VisionModel:
    if not isinstance(model, vx.VisionModel) or is_converted(model):
        kind = "a converted model" if is_converted(model) else f"a {type(model).__name__} of timm"
        raise ValueError(f"{folder} has {kind}: --hub is for models of vx.create_model")
    return model


def _card(model: vx.VisionModel, run: dict[str, Any], license: str | None) -> str:
    """The model card, with the accuracy, the data set and the command of the run."""
    data = run["config"].get("data", {})
    dataset = str(data.get("name", "unknown"))
    if dataset == "imagefolder":
        dataset = Path(os.path.abspath(Path(str(data.get("root"))).expanduser())).name
    result = run["result"]
    columns = {"accuracy": "test_top1", "top-5 accuracy": "test_top5"}
    results = {name: result[key] for name, key in columns.items() if key in result}
    epochs = round(run["rows"][-1]["epoch"])
    parts = [f"Trained on {dataset}, for {epochs} epoch{'' if epochs == 1 else 's'}."]
    if results:
        cells = [[name, f"{value:.2%}"] for name, value in results.items()]
        parts += ["## Results", Table(["test set", ""], cells).markdown()]
    else:
        parts.append("The run is not complete: it has no accuracy on the test set.")
    if run["sessions"]:
        session = run["sessions"][0]  # later ones resumed it
        versions = ", ".join(f"{k} {v}" for k, v in session.get("versions", {}).items())
        command = command_text(map(str, session.get("command", ())))
        parts += ["## Training", f"```sh\n{command}\n```", f"Versions: {versions}."]
    return vx.hub.model_card(
        model, license=license, dataset=dataset, results=results, text="\n\n".join(parts)
    )
