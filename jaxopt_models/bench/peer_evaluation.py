"""The peer of `bench.evaluation`: perplexity with transformers and torch in float32.

Runs in an environment of its own (torch, transformers, numpy), so it imports nothing of this
package: python peer_evaluation.py HF_DIRECTORY WINDOWS.npy BATCH. Prints one line of JSON.
"""

import json
import sys
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers


def main() -> None:
    directory, windows_file, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    windows = torch.from_numpy(np.load(windows_file).astype(np.int64))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        start = time.perf_counter()
        for first in range(0, len(windows), batch_size):
            tokens = windows[first : first + batch_size]
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
            nll = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1), reduction="sum"
            )
            total, count = total + nll.item(), count + tokens[:, 1:].numel()
        seconds = time.perf_counter() - start
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = {"perplexity": float(np.exp(total / count)), "seconds": seconds}
    print(json.dumps(figures | {"threads": torch.get_num_threads(), "versions": versions}))


if __name__ == "__main__":
    main()
