"""Run as a program: one mixed batch on an engine of its own; prints the replies.

`python -m tests.real.one_batch PLAN`: PLAN is a JSON file with the base's folder (`base`), the last
components of its linear layers (`linears`) and the requests (`rows`), each with the folder of its
`adapter`, or null, and its `prompt` as tokens. The last line is a list of `tokens` and `logprobs`
in the order of the requests. The engine runs in this process, with Loraplex's plugin.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from server.engine import plugin
from server.engine.cpu import op

TOKENS = 8
CHUNK = 40  # tokens a step computes at most: longer prompts are cut
MAX_RANK = 32


def main(plan: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; each engine zeroes all of it
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = sorted({row["adapter"] for row in plan["rows"] if row["adapter"]})
    requests = {path: LoRARequest(path, i + 1, path) for i, path in enumerate(adapters)}
    engine = LLM(
        plan["base"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=MAX_RANK,
        lora_target_modules=plan["linears"],
        max_model_len=512,
        max_num_seqs=min(len(plan["rows"]), CHUNK),
        max_num_batched_tokens=CHUNK,
        worker_extension_cls=f"{plugin.__name__}.{plugin.WorkerExtension.__name__}",
        disable_log_stats=True,
    )
    (state,) = engine.collective_rpc("loraplex_state")
    assert state["replaced"] and state["wrapper"] == plugin.OP_WRAPPER, state
    outputs = engine.generate(
        [{"prompt_token_ids": row["prompt"]} for row in plan["rows"]],
        SamplingParams(
            temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
        ),
        lora_request=[requests.get(row["adapter"]) for row in plan["rows"]],
        use_tqdm=False,
    )
    print(f"op: {op.form()}")
    print(json.dumps([_told(output.outputs[0]) for output in outputs]))


def _told(completion: Any) -> dict[str, Any]:
    logprobs = [[(t, p.logprob) for t, p in each.items()] for each in completion.logprobs]
    return {"tokens": list(completion.token_ids), "logprobs": logprobs}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
