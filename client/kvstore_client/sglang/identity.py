"""What SGLang's keys lack: they name tokens and salts, and nothing that else decides the bytes."""

import hashlib
from typing import Any

from kvstore.api.space import SpaceDescriptor
from kvstore_client.engine.weights import model_revision
from kvstore_client.sglang.options import SGLangOptions
from kvstore_client.sglang.pages import HostPages
from kvstore_client.sglang.serving import Serving

_LONGEST_TEXT = 256
_UNNAMED = {"dummy", "remote_instance"}
"""Ways of loading that take the weights from elsewhere."""


def descriptors(
    config: Any, pages: HostPages, options: SGLangOptions, serving: Serving
) -> list[SpaceDescriptor]:
    """The spaces of this rank's pages: one, or one for each range of heads that pages are cut into.

    Raises ValueError, saying what to set, where the weights have no name.
    """
    model = config.model_name or serving.model_path or options.model_path
    if not model:
        raise ValueError("model_name: the engine does not say what it serves; set model_path")
    rank, size = _shard(config)
    cuts = pages.cuts
    return [
        SpaceDescriptor(
            model=_short(model),
            revision=_short(_revision(config, options, serving)),
            dtype=pages.dtype,
            layout=_short(f"sglang {pages.layout} {pages.shape}"),
            block_tokens=pages.page_tokens,
            block_bytes=pages.block_bytes,
            layer_group=_short(_part_of_model(config, pages)),
            tp_rank=rank * cuts + cut,
            tp_size=size * cuts,
            rope_scaling=_short(serving.settings),
            quantization=_short(serving.quantization),
            numerics=_short(" ".join(filter(None, (_draft(pages, serving), options.variant)))),
        )
        for cut in range(cuts)
    ]


def adapters_content(options: SGLangOptions, serving: Serving) -> bytes:
    """What completes SGLang's keys: a digest of the adapters that it knows by name and path.

    Its keys do not show which of them, if any, a page belongs to, so all pages are named anew
    when one is replaced. Empty without adapters. Raises ValueError where one has no name.
    """
    if not serving.adapters:
        return b""
    if options.adapters_revision:
        return options.adapters_revision.encode()
    digest = hashlib.sha256()
    for name, path in serving.adapters:
        try:
            revision = model_revision(path)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}; or set adapters_revision") from None
        for part in (name, revision):
            digest.update(len(part.encode()).to_bytes(8, "little"))
            digest.update(part.encode())
    return digest.digest()


def _revision(config: Any, options: SGLangOptions, serving: Serving) -> str:
    if options.model_revision:
        return options.model_revision
    if serving.replaced:
        raise ValueError(
            "model_revision: the weights were replaced since the engine started, so that the path "
            "they came from does not name them; set it"
        )
    if serving.load_format in _UNNAMED:
        raise ValueError(
            f"model_revision: with load_format {serving.load_format} the weights are not those of "
            "the path, so that it does not name them; set it"
        )
    path = options.model_path or serving.model_path or config.model_name
    return model_revision(path, serving.revision)


def _shard(config: Any) -> tuple[int, int]:
    """Rank and size; ranks that hold the same bytes are one, whoever of them writes."""
    return (0, 1) if config.is_mla_model else (config.tp_rank, config.tp_size)


def _part_of_model(config: Any, pages: HostPages) -> str:
    """Which part of the model a page is. Data-parallel replicas hold the same, and share it."""
    return (
        f"layers {pages.layers} pp {config.pp_rank}/{config.pp_size} "
        f"cp {config.attn_cp_rank}/{config.attn_cp_size} dcp {config.dcp_rank}/{config.dcp_size}"
    )


def _draft(pages: HostPages, serving: Serving) -> str:
    """Names the weights of a draft model whose layers lie in the same pages."""
    if not pages.has_draft_layers or not serving.draft_path:
        return ""
    return f"draft {model_revision(serving.draft_path, serving.draft_revision)}"


def _short(text: str) -> str:
    """The text, or its digest where a descriptor has no room for it."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
