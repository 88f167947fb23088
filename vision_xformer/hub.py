"""Save and load models as folders or repositories of the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .backbones import VisionModel
from .backbones.publishing import published
from .factory import rebuilt, save_model
from .version import __version__
from .weights import read_weights
from .weights.files import replacing

WEIGHTS, CONFIG, PROCESSOR, CARD = (
    "model.safetensors", "config.json", "preprocessor_config.json", "README.md",
)  # fmt: skip
SECTION = "vision_xformer"  # of config.json: the configuration of the model
_KNOWN = ("mean", "std", "label_names")  # entries of pretrained_cfg that are saved


def save_pretrained(model: Any, folder: str | os.PathLike[str], card: str | None = None) -> None:
    """Write a folder for the Hub; see :meth:`VisionModel.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, not a file")
    if card is None and not (folder / CARD).is_file():
        card = model_card(model)
    texts = {CONFIG: _json(config_of(model)), CARD: card}
    if (processor := processor_of(model)) is not None:
        texts[PROCESSOR] = _json(processor)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_model(model, folder / WEIGHTS)  # first, so that no folder has only the other files
    except Exception:
        for path in new:
            with contextlib.suppress(OSError):  # another process has written to it
                path.rmdir()
        raise
    if processor is None:  # that of an earlier model
        (folder / PROCESSOR).unlink(missing_ok=True)
    for name, text in texts.items():
        if text is not None:
            with replacing(folder / name) as part:
                part.write_text(text, encoding="utf-8")


def push_to_hub(
    model: Any,
    repo_id: str,
    card: str | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> str:
    """Upload a model to the Hub; see :meth:`VisionModel.push_to_hub`."""
    hub = _huggingface_hub()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, card)
        try:
            api = hub.HfApi(token=token, library_name=SECTION, library_version=__version__)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message,
            )  # fmt: skip
        except Exception as error:  # the errors of its HTTP library differ between versions
            raise ValueError(
                f"{repo_id} cannot be uploaded to the Hugging Face Hub: {_reason(error)}"
            ) from error
    return str(commit.commit_url)


def from_pretrained(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> VisionModel:
    """Rebuild a model from the Hugging Face Hub or a local folder, in evaluation mode on the CPU.

    Args:
        name: a folder of :meth:`VisionModel.save_pretrained`, or "user/name" on the Hub.
        revision: branch, tag or commit on the Hub.
        token: for private repositories; by default that of ``hf auth login``.

    Returns:
        The model; its ``pretrained_cfg`` has the "mean" and "std" of the pixels and the
        "label_names" of the classes, if they are known.

    Raises:
        ValueError: for a repository that cannot be read, or that has no model of this package.
    """
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: vx.load_model reads a file of save_model")
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}")
        config, weights = folder / CONFIG, folder / WEIGHTS
        for file in (config, weights):
            if not file.is_file():
                raise ValueError(f"{folder} has no {file.name}: was it written by save_pretrained?")
    else:
        config = _download(str(name), CONFIG, revision, token)
        _section(config, str(name))  # before the download of the weights
        weights = _download(str(name), WEIGHTS, revision, token)
    section, known = _section(config, str(name))
    try:
        model = rebuilt(section, read_weights(weights), known)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return model


def config_of(model: VisionModel) -> dict[str, Any]:
    """Return config.json: what this package and transformers need to rebuild a model.

    Raises:
        ValueError: if the number of "label_names" is not that of the classes.
    """
    known = published(model.pretrained_cfg, model.config.input_shape[0])
    labels = known.get("label_names") or [f"LABEL_{i}" for i in range(model.num_classes)]
    if len(labels) != model.num_classes:
        raise ValueError(
            f"pretrained_cfg['label_names'] has {len(labels)} names, and the model "
            f"{model.num_classes} classes"
        )
    found = {
        "model_type": SECTION,
        "architectures": ["VisionXformerForImageClassification"],
        "library_name": SECTION,
        "version": __version__,
        SECTION: model.config.to_dict(),
        **known,  # not as "pretrained_cfg", by which transformers recognizes models of timm
        "id2label": dict(enumerate(labels)),
    }
    if len(set(labels)) == len(labels):  # a name of two classes, as ImageNet has, has no number
        found["label2id"] = {label: i for i, label in enumerate(labels)}
    return found


def processor_of(model: VisionModel) -> dict[str, Any] | None:
    """Return preprocessor_config.json, by which transformers prepares color images.

    For square models, images are scaled until they cover the size of the model and cropped at the
    center, as ``python -m train predict`` does; for others, which transformers cannot describe so,
    they are stretched to it. None for other inputs, or if the pixel statistics are unknown.
    """
    channels, *size = model.config.input_shape
    known = published(model.pretrained_cfg, channels)
    mean, std = (known.get(key, []) for key in ("mean", "std"))
    if channels != 3 or len(size) != 2 or not (mean and std):
        return None
    height, width = size
    whole = {"height": height, "width": width}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if height == width else whole,
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean * (3 // len(mean)),
        "image_std": std * (3 // len(std)),
    }


def model_card(
    model: VisionModel,
    *,
    license: str | None = None,
    dataset: str | None = None,
    results: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
    text: str = "",
) -> str:
    """Write the model card, README.md, of a model.

    Args:
        model: the model.
        license: identifier of the license of the weights, such as "mit"; None to state none.
        dataset: name of the data that ``results`` were measured on.
        results: values by metric, such as {"accuracy": 0.84}.
        tags: tags in addition to those of every model of this package.
        text: further sections in Markdown.

    Returns:
        The text of README.md.

    Raises:
        ValueError: for results without a data set, or a missing package.
    """
    if results and dataset is None:
        raise ValueError("results need a dataset that they were measured on")
    hub = _huggingface_hub()
    config = model.config.to_dict()
    kind, mixer = type(model).__name__, str(config.get("mixer", ""))
    about = {"license": license} if license else {}
    evaluated = [
        hub.EvalResult("image-classification", str(dataset), str(dataset), metric, value)
        for metric, value in (results or {}).items()
    ]
    data = hub.ModelCardData(
        library_name=SECTION, pipeline_tag="image-classification", model_name=kind,
        tags=list(dict.fromkeys([SECTION, config["backbone"], *filter(None, [mixer]), *tags])),
        eval_results=evaluated or None, **about,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    shape = " x ".join(map(str, model.config.input_shape))
    lines = [
        "---", data.to_yaml(), "---", "", f"# {kind}{f' with {mixer}' if mixer else ''}", "",
        "| parameters | input | classes |", "| ---: | ---: | ---: |",
        f"| {parameters:,} | {shape} | {model.num_classes:,} |", "",
        "```python", "import vision_xformer as vx", "",
        'model = vx.from_pretrained("...")  # this repository, or a folder with its files', "```",
        "", text.strip(),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _download(name: str, file: str, revision: str | None, token: str | bool | None) -> Path:
    hub = _huggingface_hub()
    try:
        return Path(
            hub.hf_hub_download(
                name, file, revision=revision, token=token, library_name=SECTION,
                library_version=__version__,
            )
        )  # fmt: skip
    except Exception as error:  # the errors of its HTTP library differ between versions
        raise ValueError(
            f"{name} is not a folder, and its {file} cannot be read from the Hugging Face Hub: "
            f"{_reason(error)}"
        ) from error


def _section(config: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model's configuration and ``pretrained_cfg`` from a config.json."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        return found[SECTION], {key: found[key] for key in _KNOWN if key in found}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} has no model of this package: its {CONFIG} has no section {SECTION!r}"
        ) from error


def _reason(error: Exception) -> str:
    """Summarize an error of huggingface_hub."""
    kinds = {
        "LocalEntryNotFoundError": "there is no connection, and the cache does not have it",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
        "ConnectError": "there is no connection",
        "ConnectTimeout": "there is no connection",
        "RevisionNotFoundError": "it has no such revision",
        "RepositoryNotFoundError": "there is no such repository, or your token may not read it",
        "LocalTokenNotFoundError": "you are not logged in: hf auth login",
    }
    first = (str(error).strip().splitlines() or [""])[0]
    return kinds.get(type(error).__name__, first or type(error).__name__)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "the Hugging Face Hub needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
