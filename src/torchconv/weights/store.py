"""A network as a folder: ``config.json`` says how to build it, ``model.safetensors`` holds the tensors."""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchconv._common import atomic_write, check, check_writable, did_you_mean, require, write_json
from torchconv._version import __version__
from torchconv.weights.report import compare_states, load_into

CONFIG, TENSORS = "config.json", "model.safetensors"


def describe(model: nn.Module) -> dict[str, Any]:
    """How to build ``model`` again: its name and options (named networks; diffusers'), and what was changed since.

    Raises:
        ValueError: the network has neither a name nor a record of changes.
    """
    config: Any = getattr(model, "torchconv_config", None)
    timms: Any = getattr(model, "pretrained_cfg", None)
    if config is None and timms:
        config = {"timm": timms["architecture"], "options": dict(getattr(model, "_model_args", {}))}
    theirs: Any = getattr(model, "config", None)
    if config is None and theirs is not None and type(model).__module__.startswith("diffusers."):
        config = {"diffusers": type(model).__name__, "options": {k: v for k, v in theirs.items() if k[0] != "_"}}
    if config is None:
        remedy = "build it by torchconv.models.create_model or timm.create_model, so that it can be built again"
        raise ValueError(f"model={type(model).__name__}: has no record of how it was built; {remedy}")
    try:
        text = json.dumps(config)
    except TypeError as error:
        remedy = "give names instead of classes, as in act_layer='silu'"
        raise ValueError(
            f"model={type(model).__name__}: an option cannot be written as JSON ({error}); {remedy}"
        ) from None
    return {"format": "torchconv", "version": __version__, **json.loads(text)}


def build(config: dict[str, Any]) -> nn.Module:
    """The network that :func:`describe` described, with fresh weights.

    Raises:
        ValueError: not such a description.
    """
    options = dict(config.get("options", {}))
    if "timm" in config:
        base: nn.Module = require("timm", "models").create_model(config["timm"], **options)
    elif "diffusers" in config:
        diffusers = require("diffusers", "generate")
        found: Any = getattr(diffusers, str(config["diffusers"]), None)
        ok = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
        check(ok, "diffusers", config["diffusers"], f"is not a network of diffusers {diffusers.__version__}")
        base = found.from_config(options)
    elif "model" in config:
        base = importlib.import_module("torchconv.models").create_model(config["model"], **options)
    else:
        raise ValueError(f"config={sorted(config)}: names no network; expected 'model', 'timm' or 'diffusers'")
    edits = config.get("edits")
    if edits:
        base = importlib.import_module("torchconv.surgery.structure").apply_edits(base, edits)
    base.torchconv_config = {k: v for k, v in config.items() if k not in ("format", "version")}  # type: ignore[assignment]
    return base


def save(model: nn.Module, where: str | Path) -> Path:
    """Write ``config.json`` and ``model.safetensors``, each moved into place when complete.

    Args:
        model: a named network, changed or not.
        where: the folder; or a file ``*.safetensors``, which then holds the description too and is all.

    Returns:
        ``where``, for :func:`load`.

    Raises:
        ValueError: the network has no record of how it was built, or is no longer what the record says.
        OSError: nothing can be written there.
    """
    where = Path(where)
    alone = _alone(where)
    config = _as_it_is(model, describe(model))
    with atomic_write(where if alone else where / TENSORS) as temporary:
        save_file(_own(model.state_dict()), temporary, metadata={"format": "pt", "config": json.dumps(config)})
    if not alone:
        write_json(where / CONFIG, config)
    return where


def check_place(where: str | Path) -> None:
    """See that :func:`save` can write there, before long work.

    Raises:
        OSError: it cannot.
    """
    where = Path(where)
    alone = _alone(where)
    if where.is_file() and not alone:
        raise NotADirectoryError(f"out={str(where)!r}: is a file; name another folder, or *.safetensors")
    check_writable("out", where, folder=not alone)


def _alone(where: Path) -> bool:
    return where.suffix == ".safetensors" and not where.is_dir()


def _as_it_is(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what was changed by hand since: the number of classes, and layers of torch.nn (heads, stems).

    Raises:
        ValueError: the network is another than ``config`` builds, in more than those.
    """
    built = _structure(config)
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != getattr(built, "num_classes", classes):
        config = {**config, "options": {**config.get("options", {}), "num_classes": classes}}
        built = _structure(config)
    edits, foreign = [], []
    for path, module in model.named_modules():
        if not _alike(module, _at(built, path)):
            edit = _replacement(path, module) if _at(built, path) is not None else None
            edits += [edit] if edit else []
            foreign += [] if edit else [f"{path} ({type(module).__name__})"]
    if edits and not foreign:
        config = {**config, "edits": [*config.get("edits", []), *edits]}
        built = _structure(config)
    report = compare_states(built, model.state_dict())
    if foreign or not report.complete:
        what = (
            f"{', '.join(foreign[:3])}{' …' if len(foreign) > 3 else ''} was put in by hand" if foreign else str(report)
        )
        remedy = (
            "build the network with the options that make it so, or keep its state dict and the code that builds it"
        )
        raise ValueError(f"model={type(model).__name__}: could not be read again, {what}; {remedy}")
    return config


def _structure(config: dict[str, Any]) -> nn.Module:
    """What ``config`` builds, without numbers where that can be done."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(config)
        except Exception:  # a constructor or an edit that computes with its numbers
            return build(config)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _alike(a: nn.Module, b: nn.Module | None) -> bool:
    """Whether two modules are of one class and, where they are layers of torch.nn, of one make."""
    if b is None or _class(a) != _class(b):
        return False
    return not _is_layer(a) or (repr(a), _shapes(a)) == (repr(b), _shapes(b))


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_layer(module: nn.Module) -> bool:
    return _class(module).startswith("torch.nn.modules.") and not any(True for _ in module.children())


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.state_dict().items()]


def _replacement(path: str, module: nn.Module) -> dict[str, Any] | None:
    """The edit that puts a layer of torch.nn in its place, if its attributes say how it was built."""
    if not path or not _is_layer(module):
        return None
    options = {n: vars(module)[n] for n in inspect.signature(type(module)).parameters if n in vars(module)}
    if "bias" in inspect.signature(type(module)).parameters:
        options["bias"] = getattr(module, "bias", None) is not None
    try:
        with torch.device("meta"):
            again = type(module)(**json.loads(json.dumps(options)))
    except (TypeError, ValueError):
        return None
    edit = {"verb": "replace", "path": path, "class": f"torch.nn.{type(module).__name__}", "options": options}
    return edit if _alike(module, again) else None


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        key = tensor.untyped_storage().data_ptr()
        shared = tensor.numel() > 0 and key in seen
        seen.add(key)
        out[name] = tensor.detach().clone().contiguous() if shared else tensor.detach().contiguous()
    return out


def load(path: str | Path, *, device: Any = "cpu") -> nn.Module:
    """A network saved by :func:`save`, in eval mode.

    Args:
        path: the folder, or its ``.safetensors`` file alone, which holds the description too.
        device: where its tensors go.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a file is damaged, the description is missing, or the tensors do not fit it.
    """
    path = Path(path)
    file = path / TENSORS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"path={str(path)!r}: holds no {TENSORS}; give a folder or file that torchconv saved")
    config = _description(path, file)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that are replaced
        model = build(config)
    tensors = load_file(file)
    first = next((t for t in tensors.values() if t.is_floating_point()), None)
    if first is not None:
        model = model.to(first.dtype)
    load_into(model, tensors)
    return model.eval().to(device)


def _description(path: Path, file: Path) -> dict[str, Any]:
    beside = file.parent / CONFIG
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("config", "")
    except SafetensorError as error:
        remedy = (
            "for an authors' checkpoint use torchconv.weights.load_official, or load it into a network and save that"
        )
        raise ValueError(f"path={str(path)!r}: is no whole file of safetensors ({error}); {remedy}") from None
    if path.is_dir() and beside.is_file():
        text, file = beside.read_text(encoding="utf-8"), beside
    try:
        config = json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise ValueError(f"path={str(file)!r}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        remedy = "load the tensors into the network that they belong to, and save that by torchconv.weights.save"
        raise ValueError(f"path={str(file)!r}: does not say how the network is built; {remedy}")
    return config


def from_pretrained(
    where: str | Path, *, revision: str | None = None, device: Any = "cpu", **download: Any
) -> nn.Module:
    """A network from a local folder, or from a repository of the Hugging Face hub.

    Args:
        where: a folder (works offline) or "owner/name".
        revision: branch, tag or commit on the hub.
        device: where its tensors go.
        download: further arguments of ``huggingface_hub.snapshot_download``.
    """
    if Path(where).exists():
        return load(where, device=device)
    hub = require("huggingface_hub", "hub")
    patterns = [CONFIG, TENSORS]
    return load(
        hub.snapshot_download(str(where), revision=revision, allow_patterns=patterns, **download), device=device
    )


def push_to_hub(model: nn.Module, repository: str, *, private: bool = False, message: str = "Add network") -> str:
    """Save a network and upload it to a repository of the Hugging Face hub, which is made if missing.

    Returns:
        The address of the commit.
    """
    hub = require("huggingface_hub", "hub")
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message))


def open_model(spec: str, **options: Any) -> nn.Module:
    """A network from what a user typed: ``timm:NAME``, ``torchconv:NAME``, or a saved folder or file.

    Args:
        spec: as above.
        options: of a named network.

    Returns:
        The network in eval mode; a named one has fresh weights.

    Raises:
        ValueError: neither a known name nor something saved.
    """
    source, _, name = spec.partition(":")
    if source in ("timm", "torchconv"):
        remedy = "put a name behind the colon, as in timm:resnet18 or torchconv:unireplknet_a"
        check(bool(name.strip()), "model", spec, remedy)
    if source == "torchconv":
        model: nn.Module = importlib.import_module("torchconv.models").create_model(name, **options)
        return model.eval()
    if source == "timm":
        timm = require("timm", "models")
        if name not in timm.list_models():
            near = did_you_mean(name, timm.list_models())
            none = f"timm {timm.__version__} has no network like it; timm.list_models('*WORD*') finds names"
            raise ValueError(f"model={spec!r}: {none if len(near) > 300 else near}")
        made: nn.Module = timm.create_model(name, **options)
        return made.eval()
    if spec.strip() and Path(spec).exists():
        return load(spec)
    raise ValueError(f"model={spec!r}: give timm:NAME, torchconv:NAME, or a folder that torchconv saved")
