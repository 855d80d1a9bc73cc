"""Loggers by name: TensorBoard, CSV, Weights & Biases and MLflow, by Lightning's classes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from sparkmim.errors import UserError
from sparkmim.runs.folder import RunFolder

_EXTRAS = ("wandb", "mlflow")
_PROJECT = "sparkmim"


def check_loggers(names: Sequence[str]) -> None:
    """Raises a `UserError` if a logger's package is not installed."""
    for name in names:
        if name in _EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(f"the logger {name} needs a package; install it by `pip install 'sparkmim[{name}]'`")


def make_loggers(names: Sequence[str], folder: RunFolder, known: Mapping[str, str]) -> list[Logger]:
    """Makes loggers that write into a run folder, unless their own settings name a server.

    Args:
        known: identifiers of a resumed run, as `identifiers` returned them, under which logging goes on.
    """
    made: list[Logger] = []
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoardLogger(folder.path, name=folder.tensorboard.name, version=""))
        elif name == "csv":
            made.append(CSVLogger(folder.path, name="csv"))  # a new version_N for every session
        elif name == "wandb":
            made.append(_wandb_logger(folder, known.get(name)))
        elif name == "mlflow":
            own, server = folder.path.absolute(), os.environ.get("MLFLOW_TRACKING_URI")
            files = None if server else (own / "mlflow").as_uri()  # by default, MLflow puts them where it is called
            server = server or f"sqlite:///{own / 'mlflow.db'}"
            named = known.get(name)
            made.append(MLFlowLogger(_PROJECT, own.name, server, artifact_location=files, run_id=named))
    return made


def _wandb_logger(folder: RunFolder, known: str | None) -> WandbLogger:
    wandb: Any = importlib.import_module("wandb")
    logger = WandbLogger(folder.path.name, folder.path, project=_PROJECT, version=known, resume="allow")
    try:
        _ = logger.experiment  # begins the run
    except wandb.errors.Error as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"wandb does not log: {why}; run `wandb login`, or set WANDB_MODE=offline") from error
    return logger


def identifiers(loggers: Sequence[Logger]) -> dict[str, str]:
    """Returns the identifiers under which Weights & Biases and MLflow know a run, by the logger's name."""
    found: dict[str, str] = {}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            found["wandb"] = str(logger.experiment.id)
        elif isinstance(logger, MLFlowLogger):
            found["mlflow"] = str(logger.run_id)
    return found


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any]) -> None:
    """Passes settings to the loggers, except TensorBoard's, which would show them as an experiment of its own."""
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings))


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Passes a picture to a logger, if that shows pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pil_to_tensor(picture), step)
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step=None)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, f"{name}/{step:08d}.png")


def close(loggers: Sequence[Logger]) -> None:
    """Lets Weights & Biases finish, which would otherwise take what follows in this process for the same run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
