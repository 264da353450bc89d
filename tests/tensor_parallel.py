"""What every process of `torchrun` runs: asks models whose layers are shared out; the first one keeps the answers.

Arguments: a file of requests, as `test_devices.py` writes it, and the file for the answers.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModel
from transformers.distributed import DistributedConfig
from vila import VilaConfig  # noqa: F401  registers the classes

requests, answers = sys.argv[1:]
sharing = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))
found = {}
for name, asked in torch.load(requests, weights_only=True).items():
    model = AutoModel.from_pretrained(asked["folder"], dtype="float32", distributed_config=sharing).eval()
    weight = model.model.language_model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        logits = model(**asked["inputs"]).logits
        ids = model.generate(**asked["inputs"], max_new_tokens=8, do_sample=False)
    found[name] = {"logits": logits, "ids": ids, "rows": weight.to_local().shape[0]}
if dist.get_rank() == 0:
    torch.save(found, answers)
dist.destroy_process_group()
