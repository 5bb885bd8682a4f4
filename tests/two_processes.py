"""A trainer for two processes on the CPU, in the place of two GPUs, which writes down what its rank saw.

Only the device is a double: Ultralytics takes ranks to be on CUDA. The group of processes, DistributedDataParallel, the
loaders and the loop are its own, and its own script starts them (`ultralytics.utils.dist.generate_ddp_file`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import LOCAL_RANK, RANK

from yolo_sophia.integration.session import unwrap

RANKS = 2
COMPILE = torch.compile


class OnCPU(DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)


class TwoProcesses(DetectionTrainer):
    """Writes `rank<r>.pt` into `$SEEN`; on the second rank, estimate number `$SPOIL` gets a NaN, and with `$EDIT` the
    class loss is another one.

    The first refresh is made from whole batches, through the graph of DistributedDataParallel, whatever is asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if LOCAL_RANK != -1:
            self.world_size = RANKS  # since 8.4 an attribute
            self.seen: dict[str, Any] = {"steps": [], "seeds": [], "windows": []}
            self.add_callback("on_train_start", TwoProcesses.watch)
            self.add_callback("on_train_batch_end", TwoProcesses.note)
            self.add_callback("on_hessian_update", TwoProcesses.keep)

    def _do_train(self, *ranks):  # an argument before 8.4
        super()._do_train(*(RANKS for _ in ranks))
        self.seen["samples"] = len(self._sophia.monitor._samples)
        self.seen["known"] = self._sophia.passes.recorder.known
        torch.save(self.seen, Path(os.environ["SEEN"]) / f"rank{RANK}.pt")

    def _setup_ddp(self, *_):
        torch.compile = lambda model, **_: COMPILE(model, backend="aot_eager")  # Inductor would take a minute
        torch.nn.parallel.DistributedDataParallel = OnCPU
        self.device = torch.device("cpu")
        dist.init_process_group("gloo")

    def final_eval(self):
        """Left out: it asks CUDA for the current device."""

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        clock = self.optimizer.param_groups[0]
        if not self.seen["steps"]:
            self.fraction, clock["hessian_fraction"] = clock["hessian_fraction"], 1.0
        else:
            clock["hessian_fraction"] = self.fraction
        self.window = {
            "batch": {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()},
            "start": {k: v.clone() for k, v in unwrap(self.model).state_dict().items()},
        }
        return batch

    def watch(self) -> None:
        estimator = self._sophia.estimator

        def watched(terms, params, generator, scale=1.0):
            self.seen["seeds"].append(generator.initial_seed())
            found = estimator(terms, params, generator, scale)
            if RANK == 1 and str(len(self.seen["seeds"]) - 1) == os.environ["SPOIL"]:
                next(e for e in found if e is not None).view(-1)[0] = torch.nan
            return found

        self._sophia.estimator = watched
        if RANK == 1 and os.environ.get("EDIT"):
            model = unwrap(self.model)
            model.criterion = model.init_criterion()
            model.criterion.bce = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(2.0))

    def keep(self) -> None:
        """Of the first two updates: the batch, the model before, gradient and h by name."""
        if len(self.seen["windows"]) < 2:
            named = [(n, p) for n, p in unwrap(self.model).named_parameters() if p.requires_grad]
            grad = {name: p.grad.clone() for name, p in named}
            h = {name: self.optimizer.state[p]["hessian"].clone() for name, p in named}
            self.seen["windows"].append({**self.window, "grad": grad, "h": h})

    def note(self) -> None:
        """After a batch: all weights and states as one vector, and the counters."""
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [s[key] for s in self.optimizer.state.values() for key in ("exp_avg", "hessian")]
        counters = {k: v for k, v in self.optimizer.param_groups[0].items() if isinstance(v, (int, float))}
        self.seen["steps"].append((torch.cat([t.flatten() for t in tensors]), counters))
