"""OpenVINO GenAI as a contender of bench/engines.py, run by the Python that has it: a line of JSON in, one out.

    python bench/openvino_worker.py EXPORTED THREADS

EXPORTED is what `optimum-cli export openvino` has written. The first token ends the prompt's time.
"""

import json
import sys
from typing import Any


def main() -> None:
    """Read a prompt and a number of tokens from each line, and answer with what a turn has shown."""
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]
    import psutil

    scheduler: Any = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # a prompt seen before would cost nothing
    settings = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": int(sys.argv[2])}
    pipeline: Any = openvino_genai.LLMPipeline(sys.argv[1], "CPU", **settings)
    config: Any = openvino_genai.GenerationConfig()
    config.do_sample, config.ignore_eos = False, True
    for line in sys.stdin:
        asked = json.loads(line)
        config.max_new_tokens = asked["new"]
        found = pipeline.generate(openvino.Tensor(np.array([asked["prompt"]], dtype=np.int64)), config).perf_metrics
        answer = {
            "prompt": len(asked["prompt"]) / found.get_ttft().mean * 1000,  # milliseconds to the first token
            "decode": 1000 / found.get_tpot().mean,  # milliseconds for each after it
            "memory": psutil.Process().memory_info().rss,
        }
        sys.stdout.write(f"\nanswer {json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
