"""The bodies of inference calls: vLLM's own, plus `adapter`."""

from pydantic import BaseModel, Field
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest as VllmResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest as VllmDetokenizeRequest,
)
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.exceptions import VLLMClientError as RefusedError

__all__ = [
    "Adapted",
    "ChatRequest",
    "CountTokensRequest",
    "DetokenizeRequest",
    "MessagesRequest",
    "RefusedError",  # what the bodies' own checks raise, past pydantic
    "ResponsesRequest",
    "TextRequest",
    "TokenizeRequest",
]


class Adapted(BaseModel):
    """What every inference call can say; `model` is every protocol's own."""

    model: str | None = None
    adapter: str | None = Field(
        default=None,
        description="Adapter to use: `sql`, `sql@3`, `sql@prod` or `sql@sha256:ab12…`. "
        "`model` may name it instead; with neither, the base answers.",
        examples=["sql"],
    )


class ChatRequest(Adapted, ChatCompletionRequest):  # type: ignore[misc]
    """Body of POST /v1/chat/completions."""


class TextRequest(Adapted, CompletionRequest):  # type: ignore[misc]
    """Body of POST /v1/completions."""


class ResponsesRequest(Adapted, VllmResponsesRequest):  # type: ignore[misc]
    """Body of POST /v1/responses."""


class MessagesRequest(Adapted, AnthropicMessagesRequest):  # type: ignore[misc]
    """Body of POST /v1/messages."""


class CountTokensRequest(Adapted, AnthropicCountTokensRequest):  # type: ignore[misc]
    """Body of POST /v1/messages/count_tokens."""


class TokenizeTextRequest(Adapted, TokenizeCompletionRequest):  # type: ignore[misc]
    """Body of POST /tokenize with a prompt."""


class TokenizeMessagesRequest(Adapted, TokenizeChatRequest):  # type: ignore[misc]
    """Body of POST /tokenize with messages."""


TokenizeRequest = TokenizeTextRequest | TokenizeMessagesRequest


class DetokenizeRequest(Adapted, VllmDetokenizeRequest):  # type: ignore[misc]
    """Body of POST /detokenize."""
