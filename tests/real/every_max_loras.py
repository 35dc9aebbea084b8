"""Run as a program: the engine with each number of slots, on mixed batches; prints the replies.

`python -m tests.real.every_max_loras SLOTS BASE ADAPTER…`: adapters are PEFT folders. For each
number of slots in SLOTS, given as JSON, one batch with a base row, one
row for each of as many adapters as there are slots and one more (so that slots are used again),
short and long prompts that are cut into chunks, in shuffled order; then the same once more, out of
the prefix cache. The engine runs in this process: starting a server for each would take minutes.
"""

import json
import os
import random
import sys

from server.engine import launch
from server.engine.cpu import op
from tests.conftest import SEVEN, THOROUGH

MOST = 16
SLOTS = tuple(range(1, MOST + 1)) if THOROUGH else (1, 5, MOST)
TOKENS = 6
CHUNK = 48  # tokens a step computes at most: longer prompts are cut


def main(numbers: list[int], base: str, adapters: list[str]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; each engine zeroes all of it
    print(f"op: {op.form()}")
    for slots in numbers:
        print(json.dumps(replies(base, adapters, slots)), flush=True)


def replies(base: str, adapters: list[str], slots: int) -> list[dict[str, object]]:
    """Of the engine with `slots`: adapter (None for the base), prompt, tokens and logprobs."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    engine = LLM(
        base,
        dtype="float32" if launch.slow_in_bf16() else "auto",  # as the server
        enforce_eager=True,
        enable_lora=True,
        max_loras=slots,
        max_cpu_loras=len(adapters),
        max_lora_rank=64,
        lora_target_modules=list(SEVEN),
        max_model_len=512,
        max_num_seqs=MOST + 2,
        max_num_batched_tokens=CHUNK,
        disable_log_stats=True,
    )
    chosen = random.Random(slots)
    rows: list[int | None] = [None, *range(min(slots + 1, len(adapters)))]
    chosen.shuffle(rows)
    prompts = [
        [chosen.randrange(1000, 20000) for _ in range(chosen.choice((5, 20, 130)))] for _ in rows
    ]
    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
    )
    requests = [
        None if row is None else LoRARequest(f"adapter-{row}", row + 1, adapters[row])
        for row in rows
    ]
    found: list[dict[str, object]] = []
    for _ in range(2):
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=requests,
            use_tqdm=False,
        )
        for row, prompt, output in zip(rows, prompts, outputs, strict=True):
            completion = output.outputs[0]
            logprobs = [[(t, p.logprob) for t, p in each.items()] for each in completion.logprobs]
            found.append(
                {
                    "slots": slots,
                    "adapter": row,
                    "prompt": prompt,
                    "tokens": list(completion.token_ids),
                    "logprobs": logprobs,
                }
            )
    del engine
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
