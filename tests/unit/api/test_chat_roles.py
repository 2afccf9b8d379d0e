"""Chats with any roles and with empty messages, over HTTP and by either plan, with a tiny model behind the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from local_gateway import serving
from models import save_tiny, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, tiny_llama(torch.float64, layers=6)[1])
    return folder


@pytest.mark.parametrize("model", [{}, {"plan": "speed"}, {"plan": "speed", "anchors": "system"}], ids=str)
async def test_a_chat_is_answered_whatever_roles_it_has(folder: Path, model: dict[str, Any]) -> None:
    """A chat of system messages alone has a system prompt up to the header of its answer."""
    async with serving(folder, **model) as served:
        for roles in (["system"], ["system", "system"], ["user"], ["assistant"], ["system", "user"]):
            for content in ("", "the sea is wide"):
                messages = [{"role": role, "content": content} for role in roles]
                answer = await served.post("/v1/chat/completions", messages=messages, max_tokens=2, ignore_eos=True)
                assert answer["usage"]["completion_tokens"] == 2
