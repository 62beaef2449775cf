"""The peer of `bench.calibration`: NVIDIA Model-Optimizer's calibration in float32 on the CPU.

Runs in an environment of its own (nvidia-modelopt, torch, transformers, numpy), so it imports
nothing of this package:

    python peer_calibration.py HF_DIRECTORY WINDOWS.npy BATCH awq|gptq

Weights become INT4 in blocks of 128. Prints one line of JSON.
"""

import contextlib
import copy
import json
import sys
import time

import modelopt  # pyright: ignore[reportMissingImports]
import modelopt.torch.quantization as mtq  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers


def main() -> None:
    directory, windows_file, batch, algorithm = sys.argv[1:]
    windows = torch.from_numpy(np.load(windows_file).astype(np.int64))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for tokens in windows.split(int(batch)):
                model(input_ids=tokens, use_cache=False)

    settings = copy.deepcopy(mtq.INT4_AWQ_CFG)
    if algorithm == "gptq":
        settings = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
        settings["algorithm"] = {"method": "gptq"}
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        mtq.quantize(model, settings, calibrate)
        seconds = time.perf_counter() - start
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["nvidia-modelopt"] = modelopt.__version__
    threads = torch.get_num_threads()
    print(json.dumps({"seconds": seconds, "threads": threads, "versions": versions}))


if __name__ == "__main__":
    main()
