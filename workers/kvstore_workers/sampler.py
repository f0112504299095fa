"""Chooses the next token of one request."""

import torch

from kvstore_workers.request import Request


class Sampler:
    """Draws tokens from logits, reproducibly: its random numbers belong to one request alone."""

    def __init__(self, request: Request) -> None:
        self._temperature = request.temperature
        self._top_p = request.top_p
        self._random = torch.Generator(device="cpu").manual_seed(request.seed)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and nothing is drawn."""
        return self._temperature == 0.0

    def choose(self, logits: torch.Tensor) -> int:
        """The next token for the logits, float32 [vocabulary] on the CPU."""
        if self.greedy:
            return int(logits.argmax())
        chances, tokens = torch.softmax(logits / self._temperature, dim=-1).sort(
            descending=True, stable=True
        )
        # A token stays if those before it have not reached top_p: the first always does.
        kept = chances.cumsum(-1) - chances < self._top_p
        kept[0] = True
        drawn = torch.multinomial(chances * kept, 1, generator=self._random)
        return int(tokens[drawn])
