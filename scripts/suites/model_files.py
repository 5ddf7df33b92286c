"""What the sides read: a model's directory, and the GGUF files that are made from it for llama.cpp."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import tomllib
from typing import Any

from suites import gguf_file
from suites.sides import FLOATS, PEERS

BITS = {"F32": 32, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.6}  # of a weight in a file; the output matrix of Q4_0 has more


class Files:
    """A model's directory, that of `--model` or random weights of `--shape`; `made` is a folder for what is written."""

    def __init__(self, args: argparse.Namespace, made: pathlib.Path):
        from jaxinfer import hub, models
        from jaxinfer.weights.safetensors import read_json

        self.made, self.random = made, args.shape is not None
        self.directory = made / "model" if self.random else hub.locate(args.model)
        self.raw = read_shape(args.shape) if self.random else read_json(self.directory / "config.json")
        self.config = models.config_from_hf(self.raw)

    def check(self, forms: set[str]) -> None:
        """Refuses what the disk has no room for; forms: those of llama.cpp that will be asked for."""
        from jaxinfer import roofline

        kinds = forms | {source_of(form) for form in forms}
        bits = sum(BITS[kind] for kind in kinds) + BITS["BF16"] * self.random
        need, free = roofline.params_count(self.config) * bits / 8, shutil.disk_usage(self.made).free
        if need > free:
            raise ValueError(
                f"the sides' files need {need / 1e9:.1f} GB but {free / 1e9:.1f} GB are free in {self.made.parent}: "
                "set TMPDIR to a directory with more room, or take a smaller shape"
            )

    def write_random(self, seed: int) -> None:
        """Random weights in bfloat16, which all other forms are made from."""
        import jax

        from jaxinfer import models
        from jaxinfer.training.export import save_huggingface

        params = models.init_params(self.config, jax.random.key(seed), "bfloat16")
        save_huggingface(self.directory, params, self.raw | {"dtype": "bfloat16"})

    def gguf(self, form: str) -> tuple[pathlib.Path, pathlib.Path]:
        """The file that is written for a form of llama.cpp, and the one that it loads: itself, or made from that."""
        kind = source_of(form)
        path = self.made / f"{kind}.gguf"
        if not path.exists():
            gguf_file.write_gguf(self.directory, path, kind)
        return path, self.made / f"{form}.gguf"

    def weight_bytes(self, form: str) -> int:
        """Bytes of weights that a decode step of a row reads, in a dtype or a form of ours."""
        from jaxinfer.roofline.sizes import read_bytes

        return round(read_bytes(self.config, 1, packed(form)))


def source_of(form: str) -> str:
    """What we write so that llama.cpp can have a form."""
    return "F32" if form == "F32" else "BF16"


def forms_of(dtypes: list[str], peers: dict[str, str]) -> set[str]:
    """Those of llama.cpp that will be asked for."""
    return {PEERS["llama.cpp"].forms[dtype] for dtype in dtypes} if "llama.cpp" in peers else set()


def read_shape(path: pathlib.Path) -> dict[str, Any]:
    """The config.json keys of a shape."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give a shape such as configs/models/llama-3.2-1b.toml")
    return tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())


def packed(form: str) -> Any:
    """How roofline counts weights in a form of ours."""
    from jaxinfer import roofline

    return form if form in FLOATS else roofline.weights_of(form)
