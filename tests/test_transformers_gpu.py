"""`generate()` on a GPU with stored prompts: bit for bit what it computes without them."""

from collections import Counter

import pytest
import torch

from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import ask, patient

pytest_plugins = ["tests.transformers_fixtures"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_prompt_that_a_gpu_computed_is_restored_to_the_bit(family: str, endpoint: str) -> None:
    """Also where only its beginning is shared, and past the window."""
    model = tiny_model(family, seed=4).to("cuda")
    long = prompt(6 * CHUNK + 3).to("cuda")
    fork = torch.cat([long[:, : 4 * CHUNK + 2], prompt(9, seed=1).to("cuda")], dim=1)
    with patient(model, endpoint) as cache:
        assert ask(cache, model, long) == (0, Counter())
        assert ask(cache, model, long)[0] == 6 * CHUNK
        assert ask(cache, model, fork)[0] == 4 * CHUNK
    with patient(model, endpoint) as another:
        assert ask(another, model, long)[0] == 6 * CHUNK
