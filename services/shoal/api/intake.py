"""From a checked body to a running generation: the steps that every door of the gateway shares."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from shoal.api.access import Access, asking
from shoal.api.backend import Backend, GatewayObserver, Readiness
from shoal.api.bodies import Bodies
from shoal.api.exchange import Exchange
from shoal.api.generation import Generation
from shoal.api.keys import Keyring
from shoal.api.places import Places
from shoal.api.schema import ChatBody, CompletionBody
from shoal.api.tokenizer import Tokenizer
from shoal.api.validation import ServedModel, check_limits, find_model, generate_requests
from shoal.config import GatewayConfig
from shoal.errors import DeadlineExceeded, Overloaded
from shoal.wire.messages import Depth, RequestContext


@dataclass(frozen=True, slots=True)
class Services:
    """What all requests share. ``clock`` is monotonic seconds. Only some plans want to know a conversation's parts.

    With a ``keyring``, requests need a key.
    """

    backend: Backend
    tokenizer: Tokenizer
    models: tuple[ServedModel, ...]
    config: GatewayConfig
    observer: GatewayObserver
    clock: Callable[[], float] = time.monotonic
    wants_outline: bool = False
    keyring: Keyring | None = None
    places: Places = field(default_factory=Places)
    bodies: Bodies = field(init=False)
    require_healthy: Callable[[], None] = lambda: None
    """Raises the ShoalError that says which part of this process doesn't work."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bodies", Bodies(self.config))

    @property
    def access(self) -> Access:
        return Access(self.keyring, self.observer)

    async def readiness(self) -> Readiness:
        """Of the pools behind. Raises a ShoalError where this process itself isn't healthy."""
        self.require_healthy()
        return await self.backend.readiness()


def enter(services: Services, exchange: Exchange) -> None:
    """Take a place, before anything of a request is read; ``exchange`` gives it back, and learns whose request it is.

    Raises Overloaded where too many are here, RateLimited where this tenant asks for too much.
    """
    tenant = asking()
    exchange.tenant = tenant.name
    exchange.exits.enter_context(_admitted(services, exchange))
    exchange.exits.enter_context(tenant.running(ran=exchange.ran))


async def take_in(
    body: CompletionBody | ChatBody,
    services: Services,
    exchange: Exchange,
    *,
    request_id: str,
    traceparent: str | None = None,
    timeout_s: float | None = None,
) -> Generation:
    """Everything that can be refused before a pool hears of the request, which has entered; ``exchange`` learns what is
    known of it.

    ``timeout_s`` is how long the client waits, from the request's arrival; the configured deadline holds if it's
    sooner. Raises the RequestError that tells what is wrong, RateLimited where its tenant holds too much,
    DeadlineExceeded where no time is left.
    """
    tenant = asking()
    exchange.model = body.model
    model = find_model(services.models, body.model)
    check_limits(body, model, services.config)
    prompts = await _encode(body, services.tokenizer, model.max_context_tokens)
    deadline_s = services.config.deadline_s if timeout_s is None else min(timeout_s, services.config.deadline_s)
    left_s = deadline_s - (services.clock() - exchange.arrived_s)
    if left_s <= 0:
        raise DeadlineExceeded("the request's deadline has passed")
    context = RequestContext(
        request_id=request_id,
        timeout_s=left_s,
        traceparent=traceparent,
        tenant=tenant.name,
    )
    requests = generate_requests(body, prompts, model, context)
    num_more = len(requests) - 1  # each is as much work as a request of its own
    exchange.exits.enter_context(tenant.running_more(num_more, ran=exchange.ran))
    exchange.exits.enter_context(_admitted(services, exchange, num_more))
    exchange.exits.enter_context(tenant.holding(sum(request.max_kv_tokens for request in requests)))
    if services.wants_outline and isinstance(body, ChatBody) and requests[0].depth is Depth.SHALLOW:
        outline = await services.tokenizer.outline_chat(body.messages, prompts[0], may_think=body.may_think)
        requests = tuple(replace(request, outline=outline) for request in requests)
    if body.needs_full_depth is not None:
        services.observer.needed_full_depth(body.needs_full_depth)
    exchange.generation = Generation(
        services.backend,
        requests,
        arrived_s=exchange.arrived_s,
        observer=services.observer,
        clock=services.clock,
        echoes=_echoes(body, services.tokenizer),
    )
    return exchange.generation


def _admitted(services: Services, exchange: Exchange, num: int = 1) -> AbstractContextManager[None]:
    places, most = services.places, services.config.max_running
    if (num_missing := places.num_taken + num - most) > 0:
        raise Overloaded(
            f"{most} requests are running, as many as may: try again later", retry_after_s=places.wait_s(num_missing)
        )
    return places.taken(num, ran=exchange.ran)


async def _encode(body: CompletionBody | ChatBody, tokenizer: Tokenizer, max_tokens: int) -> Sequence[Sequence[int]]:
    """Each prompt's token ids. What can't fit the model's ``max_tokens`` may be refused without encoding it."""
    if isinstance(body, ChatBody):
        return [await tokenizer.encode_chat(body.messages, max_tokens=max_tokens, may_think=body.may_think)]
    return [
        await tokenizer.encode(prompt, max_tokens=max_tokens) if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]


def _echoes(body: CompletionBody | ChatBody, tokenizer: Tokenizer) -> Sequence[str]:
    """Texts for answers to begin with, one a prompt: as they came, or what their token ids say."""
    if not isinstance(body, CompletionBody) or not body.echo:
        return ()
    return [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompt]
