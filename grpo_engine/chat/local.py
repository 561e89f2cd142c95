"""A Hugging Face model as a chat model, sampled by the engine's own generator."""

from __future__ import annotations

from pydantic import Field

from grpo_engine.chat.base import (
    ChatModel,
    ChatOptions,
    ChatSampling,
    Conversation,
    OnFailure,
    OnReplies,
)
from grpo_engine.chat.cache import ReplyCache
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.manifest import weights_sha256
from grpo_engine.policy import Policy
from grpo_engine.templates import render_prompt, require_template
from grpo_engine.types import GenerationRequest, SamplingParams


class LocalOptions(ChatOptions):
    """``template``: how a conversation becomes the model's prompt, see ``templates.render_prompt``.
    ``batch_size`` conversations are decoded together and then kept, so at most that many replies
    are lost when the run is stopped."""

    device: str = "auto"
    dtype: str = "float32"
    template: str = "chat"
    batch_size: int = Field(32, ge=1)
    batch_tokens: int = Field(262_144, ge=1)


class LocalModel(ChatModel):
    """``spec``: a local folder, a Hugging Face id, or "miniature" / "smollm2-135m-instruct".

    A conversation that does not fit the model's positions together with ``max_tokens`` fails.
    Raises UserError for what cannot be loaded.
    """

    OPTIONS = LocalOptions

    def __init__(self, spec: str, options: LocalOptions, cache: ReplyCache | None = None) -> None:
        self._policy = Policy.load(
            spec, device=options.device, dtype=options.dtype, trainable=False
        )
        require_template(options.template, self._policy.tokenizer)
        self._template, self._batch_size = options.template, options.batch_size
        self._generator = HFGenerator(
            self._policy,
            max_batch_size=options.batch_size,
            max_batch_tokens=options.batch_tokens,
        )
        identity = {
            "kind": "local",
            "weights_sha256": weights_sha256(self._policy.model),
            "dtype": options.dtype,
            "template": options.template,
            "chat_template": getattr(self._policy.tokenizer, "chat_template", None),
        }
        super().__init__(identity, {"judge": spec}, cache)

    def close(self) -> None:
        self._generator.close()
        super().close()

    def _ask(
        self,
        conversations: list[Conversation],
        sampling: ChatSampling,
        on_replies: OnReplies,
        on_failure: OnFailure,
    ) -> None:
        # Greedy is top-k 1: the sampler has no temperature 0.
        greedy = sampling.temperature == 0
        params = SamplingParams(
            sampling.max_tokens,
            temperature=1.0 if greedy else sampling.temperature,
            top_k=1 if greedy else 0,
        )
        limit = getattr(self._policy.text_config, "max_position_embeddings", None)
        requests: list[tuple[int, GenerationRequest]] = []
        for index, conversation in enumerate(conversations):
            ids = self._prompt_ids(conversation)
            if limit is not None and len(ids) + sampling.max_tokens > limit:
                on_failure(
                    index,
                    f"too long: {len(ids)} tokens and max_tokens {sampling.max_tokens} pass the "
                    f"model's {limit} positions",
                )
                continue
            requests.append((index, GenerationRequest(ids, sampling.seed_of(conversation))))
        for start in range(0, len(requests), self._batch_size):
            batch = requests[start : start + self._batch_size]
            drawn = self._generator.generate([request for _, request in batch], params)
            replies = {}
            for (index, _), one in zip(batch, drawn, strict=True):
                if sampling.whole and one.finish_reason == "length":
                    on_failure(index, sampling.cut)
                    continue
                decode = self._policy.tokenizer.decode
                replies[index] = decode(one.text_ids, skip_special_tokens=False)
            on_replies(replies)

    def _prompt_ids(self, conversation: Conversation) -> list[int]:
        text = render_prompt({"prompt": conversation}, self._template, self._policy.tokenizer)
        # A chat template writes the special tokens itself; otherwise the tokenizer adds its own.
        special = self._template != "chat"
        return self._policy.tokenizer(text, add_special_tokens=special)["input_ids"]
