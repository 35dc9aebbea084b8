"""vLLM's own OpenAI and Anthropic handlers, put together over an engine client of ours."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.generate.api_router import init_generate_state
from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
from vllm.entrypoints.mcp.tool_server import init_tool_server
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.entrypoints.serve.utils.request_logger import RequestLogger
from vllm.lora.request import LoRARequest
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.online_renderer import OnlineRenderer

from server.engine.call import current

__all__ = ["ErrorResponse", "Handlers", "explain", "with_cancellation"]


class _Selected(Mapping[str, LoRARequest]):
    """The adapters that vLLM's handlers see: the one that the request at hand asked for."""

    def __getitem__(self, name: str) -> LoRARequest:
        call = current.get()
        if call.lora is None or name != call.asked:
            raise KeyError(name)
        return call.lora

    # Handlers iterate only to find default adapters of images and audio, which we do not have.
    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class Models(OpenAIServingModels):  # type: ignore[misc]
    """vLLM's book of models, with the request's own selection in place of a table of names."""

    def __init__(self, engine: Any, base_model_paths: list[BaseModelPath]) -> None:
        super().__init__(engine, base_model_paths)
        self.lora_requests = _Selected()

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The `model` of a reply: what the request asked for."""
        return current.get().asked


@dataclass(frozen=True)
class Handlers:
    """One handler a protocol; each takes a parsed body and the raw request."""

    chat: Any
    completions: Any
    responses: Any
    messages: Any
    tokenization: Any

    @classmethod
    async def build(cls, engine: Any, args: Namespace) -> "Handlers":
        """The handlers over `engine`, set up from vLLM's parsed arguments as vLLM's server does."""
        tasks = await engine.get_supported_tasks()
        logger = RequestLogger(max_log_len=args.max_log_len) if args.enable_log_requests else None
        template = load_chat_template(args.chat_template)
        template_kwargs = resolve_default_chat_template_kwargs(args)
        state = SimpleNamespace(
            tool_server=await init_tool_server(args),
            openai_serving_models=Models(
                engine, [BaseModelPath(name, args.model) for name in args.served_model_name]
            ),
            online_renderer=OnlineRenderer(
                model_config=engine.model_config,
                renderer=engine.renderer,
                request_logger=logger,
                chat_template=template,
                chat_template_content_format=args.chat_template_content_format,
                trust_request_chat_template=args.trust_request_chat_template,
                trust_request_mm_kwargs=args.trust_request_mm_kwargs,
                enable_auto_tools=args.enable_auto_tool_choice,
                exclude_tools_when_tool_choice_none=args.exclude_tools_when_tool_choice_none,
                tool_parser=args.tool_call_parser,
                tool_strict_level=args.tool_strict_level,
                reasoning_parser=args.structured_outputs_config.reasoning_parser,
                default_chat_template_kwargs=template_kwargs,
                log_error_stack=args.log_error_stack,
            ),
        )
        await init_generate_state(engine, state, args, logger, tasks, template_kwargs)
        return cls(
            chat=state.openai_serving_chat,
            completions=state.openai_serving_completion,
            responses=state.openai_serving_responses,
            messages=state.anthropic_serving_messages,
            tokenization=ServingTokenization(
                state.openai_serving_models,
                state.online_renderer,
                request_logger=logger,
                chat_template=template,
                chat_template_content_format=args.chat_template_content_format,
                default_chat_template_kwargs=template_kwargs,
                trust_request_chat_template=args.trust_request_chat_template,
            ),
        )


def explain(error: Exception) -> ErrorResponse:
    """vLLM's own reading of an exception that its handlers or its engine raised."""
    return create_error_response(error)
