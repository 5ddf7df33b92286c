"""configs/models/*.toml: the shapes that `--random-weights` takes."""

import math
import pathlib
import tomllib

import jax
import pytest

from jaxinfer.models import config_from_hf, param_shapes

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "models"
PARAMETERS = {  # as published with each model
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),  # without the vision tower and its projector
    "llama-1.1b-bench": 1_104_218_112,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def raw_of(name):
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def test_every_shape_has_its_published_size_here():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_published_number_of_parameters(name):
    shapes = param_shapes(config_from_hf(raw_of(name)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_says_where_its_numbers_come_from(name):
    assert (FOLDER / f"{name}.toml").read_text().startswith("# ")


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_unknown_key_of_a_shape_is_refused(name):
    with pytest.raises(ValueError, match="num_experts"):
        config_from_hf(raw_of(name) | {"num_experts": 8})


def test_the_benchmark_shape_is_the_one_that_figures_are_given_for():
    config = config_from_hf(raw_of("llama-1.1b-bench"))
    layer = config.layers[0]
    assert (len(config.layers), config.width, config.vocab_size, config.tied) == (16, 2048, 32000, False)
    assert (layer.ffn_width, layer.num_heads, layer.num_kv_heads, layer.head_width) == (8192, 32, 8, 64)


def test_gemma_has_five_local_layers_to_one_global():
    windows = [spec.window for spec in config_from_hf(raw_of("gemma-3-4b")).layers]
    assert windows == ([1024] * 5 + [None]) * 5 + [1024] * 4
