"""Super-network training by transformers' Trainer.

trainer = jointopt.ElasticTrainer(model=model, space=space, args=args, train_dataset=train, eval_dataset=valid)
trainer.train()
study = jointopt.search(trainer.supernet, quality=accuracy, evaluations=200)
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from jointopt.batches import Batch
from jointopt.names import ADAPTERS, LEARNED_RANGES
from jointopt.outputs import IGNORED, logits_of, without_cache
from jointopt.supernet.adapters import adapted, with_adapters
from jointopt.supernet.batch_norm import has_batch_norm, reestimate
from jointopt.supernet.importance import check_sortable
from jointopt.supernet.range_factors import learn
from jointopt.supernet.supernet import Supernet
from jointopt.training.elastic import elastic_loss
from jointopt.training.lora import attach, merge
from jointopt.training.recipe import NONE_COUNTED, Recipe, checked
from jointopt.training.trainer_arguments import check_args, check_checkpointing, check_optimizer, smoothed, supernet_of
from jointopt.training.trainer_checkpoint import RECORD, restore, write_beside, writing_all
from quant.errors import JointoptError, check_count, check_kind
from search_spaces.families import Declare
from search_spaces.space import SearchSpace

SAMPLES = 128
"""Of the training data, by which importance and ranges are calibrated where nothing else is given."""


class ElasticTrainer(Trainer):
    """A Trainer whose every step trains the largest and some smaller sub-networks: see `Recipe`.

    All that the Trainer does it does here: accumulation, mixed precision, gradient checkpointing, several processes,
    checkpoints and resuming, callbacks. Evaluation scores the largest sub-network, and logs the losses of the
    smallest and of one in the middle beside its own. What is saved is the largest, a model of its own class.

    Args:
        model: the model to be made elastic; it is copied, and stays as it is.
        space: its search space (default: that of its family); or `supernet`, a calibrated super-network made before,
            in place of both.
        recipe: what each step trains (default: the sandwich rule, distilled from the largest, `args.seed`).
        calibration: batches of model inputs (default: 128 samples of `train_dataset`, drawn by `args.seed`; where it
            has no length the first 128, which it has to give again for training).
        family: a declaration of one's own (model -> Family).
        sort_every: steps after which channels and heads are sorted again, by their importance on `calibration`.
        lora: a `peft.LoraConfig`: adapters of its layers alone are trained, and merged in what is saved, and when
            training has ended. Until then a callback's `model` computes without them.
        **options: the Trainer's own: data_collator, processing_class, compute_metrics, callbacks, optimizers, ...

    Attributes:
        supernet: calibrated when `train` has returned, so that it can be searched.

    Raises:
        JointoptError: a model that is wrapped already, a space of another model, data without labels, float16,
            torch_compile, a loss function that is not the recipe's, an optimizer made before what it is to train.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        space: SearchSpace | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        supernet: Supernet | None = None,
        recipe: Recipe | None = None,
        calibration: Iterable[Mapping[str, Any]] | None = None,
        family: Declare | None = None,
        sort_every: int | None = None,
        lora: Any = None,
        **options: Any,
    ):
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        check_kind("args", args, TrainingArguments, "TrainingArguments, or None")
        check_args(args, options)
        self.supernet = supernet_of(model, space, supernet, family)
        check_checkpointing(args, self.supernet.model)
        recipe = (checked(recipe) or Recipe(seed=args.seed)).suited(self.supernet.model)
        self.recipe = smoothed(recipe, args.label_smoothing_factor)
        self.sort_every = sort_every
        self._counted: bool | None = None
        whole = self.supernet.model
        with without_cache(whole):
            super().__init__(model=whole, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        check_optimizer(self.optimizer, self.supernet)
        self.label_names: list[str] = self.label_names or ["labels"]
        check_count("sort_every", sort_every)
        if train_dataset is not None:
            self._check_labels("train_dataset", train_dataset)
        if isinstance(eval_dataset, dict):
            for name, dataset in eval_dataset.items():
                self._check_labels(f"eval_dataset: {name}", dataset)
        elif eval_dataset is not None:
            self._check_labels("eval_dataset", eval_dataset)
        # The Trainer divides what `compute_loss` returns by the number of batches in a step.
        self.loss_is_scaled_for_ga = False
        self._calibration = list(calibration) if calibration is not None else self._some_samples()
        if not self.supernet.calibrated and not self.supernet.trained:
            if calibration is None and train_dataset is None:
                raise JointoptError(
                    "train_dataset: found none, and so nothing to calibrate with; allowed: one, calibration=, or a "
                    "calibrated supernet="
                )
            with without_cache(whole):
                self.supernet.calibrate(self._calibration)
        self.recipe.check(self.supernet)
        if lora is not None and sort_every is not None:
            raise JointoptError("sort_every: adapters are not sorted; allowed: without lora")
        self._lora, self._optimizer_given = lora, self.optimizer is not None
        self._add()

    def _add(self) -> bool:
        """Adapters and learned ranges among the parameters, where they are not; whether some were missing."""
        adapters = self._lora is not None and not adapted(self.supernet.model)
        ranges = self.recipe.learned_ranges and LEARNED_RANGES not in self.supernet.model._parameters
        if self._optimizer_given and (adapters or ranges):
            raise JointoptError(
                f"optimizers: found one made before {'adapters' if adapters else 'learned ranges'}, which it would not "
                "train; allowed: optimizer_cls_and_kwargs" + ("" if adapters else ", or supernet.learn_ranges() before")
            )
        if adapters:
            attach(self.supernet, self._lora)
        if ranges:
            learn(self.supernet)
        self._began_with = [name for name, each in self.supernet.model.named_parameters() if each.requires_grad]
        return adapters or ranges

    def _some_samples(self) -> list[Batch]:
        """Inputs of some of the training data's samples, as its collator makes them."""
        if self.train_dataset is None:
            return []
        collate = self._get_collator_with_removed_columns(self.data_collator, "calibration")
        size = self.args.per_device_train_batch_size
        whole: Any = self.train_dataset
        if hasattr(whole, "__len__") and hasattr(whole, "__getitem__"):  # which need not end where it is iterated
            drawn = np.random.default_rng(self.args.seed).permutation(len(whole))[:SAMPLES]
            samples = [whole[at] for at in drawn.tolist()]
        else:
            samples = list(islice(iter(whole), SAMPLES))
        batches = [collate(samples[at : at + size]) for at in range(0, len(samples), size)]
        return [self._inputs(batch) for batch in batches]

    def _check_labels(self, dataset_name: str, dataset: Any) -> None:
        """Raises JointoptError where no labels come of the first sample, from which a collator may make them."""
        _check_repeatable(dataset_name, dataset)
        first = next(iter(dataset), None)
        if first is None:
            raise JointoptError(f"{dataset_name}: found no sample; allowed: one or more")
        batch = self._get_collator_with_removed_columns(self.data_collator, "training")([first])
        if not any(name in batch for name in self.label_names):
            raise JointoptError(
                f"{dataset_name}: found {', '.join(map(str, batch))}; allowed: one of them "
                f"{' or '.join(self.label_names)}, there or from the data_collator"
            )

    def _inputs(self, batch: Mapping[str, Any]) -> Batch:
        return {name: value for name, value in batch.items() if name not in (*self.label_names, "labels")}

    def train(self, *args: Any, **options: Any) -> Any:
        """The Trainer's `train`; afterwards the super-network is calibrated on its new weights.

        However it ends, adapters become part of the weights. Another call trains new ones, by an optimizer of its own.
        """
        self._last_sorted: int | None = None
        self._counted = None
        if self._add():
            self.optimizer = self.lr_scheduler = None
        ended = self._ended(args[0] if args else options.get("resume_from_checkpoint"))
        with without_cache(self.supernet.model):
            try:
                found = super().train(*args, **options) if ended is None else self._trained_before(ended)
            finally:
                self._undo()
                if adapted(self.supernet.model):
                    merge(self.supernet)
            self.supernet.calibrate(self._calibration)
        if self._counted is False:
            warnings.warn(NONE_COUNTED, stacklevel=2)
        return found

    def _ended(self, resumed: str | bool | None) -> str | None:
        """The checkpoint to go on from, where it is of the last step; the Trainer would make one more."""
        folder = get_last_checkpoint(self.args.output_dir) if resumed is True else resumed
        if not folder:
            return None
        state = Path(folder) / TRAINER_STATE_NAME
        if not state.is_file():
            raise JointoptError(
                f"train: {str(folder)!r} holds no {TRAINER_STATE_NAME}, which is written last; allowed: a whole "
                "checkpoint, such as the one before it"
            )
        saved = TrainerState.load_from_json(str(state))
        if self.args.auto_find_batch_size and saved.train_batch_size is not None:
            self._train_batch_size = saved.train_batch_size  # what the Trainer goes on with, and its steps are of
        *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return str(folder) if 0 < steps <= saved.global_step else None

    def _trained_before(self, folder: str) -> TrainOutput:
        self._load_from_checkpoint(folder)
        self.state = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _undo(self) -> None:
        """What the Trainer does to a model for training alone, which a search shall not score nor an export keep."""
        model: Any = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        if self.args.gradient_checkpointing:
            # Named so since transformers 5.24, where the earlier name warns.
            undo = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            undo()
            if getattr(model, "_require_grads_hooks", None):
                model.disable_input_require_grads()

    def hyperparameter_search(self, *args: Any, **options: Any) -> Any:
        """Refused: the Trainer would train models that are no super-network's."""
        raise JointoptError("hyperparameter_search: makes models of its own; allowed: an ElasticTrainer for each trial")

    def training_step(self, *args: Any, **options: Any) -> Any:
        """The Trainer's. Raises JointoptError where a subclass computes a loss in which no sub-network is."""
        self._elastic = False
        found = super().training_step(*args, **options)
        if not self._elastic:
            raise JointoptError(
                f"train: {type(self).__name__}.compute_loss takes the place of ElasticTrainer's, so that no "
                "sub-network is trained; allowed: Recipe(loss=...), or super().compute_loss(...) in training"
            )
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the loss of all sub-networks of the step, otherwise the largest one's."""
        batch = self._labelled(inputs)
        if model.training:
            self._elastic = True
            self._counted = self._counted or self.recipe.counts(batch["labels"])
            step = self.state.global_step
            if self.sort_every and step == 1:
                check_sortable(self._inner_optimizer())
            if self.sort_every and step and step % self.sort_every == 0 and not self._sorted(step):
                self.supernet.sort_again(self._calibration, self._inner_optimizer())
            loss = elastic_loss(self.supernet, batch, step, self.recipe, self.state.max_steps)
            return loss * self._share_of_step(batch["labels"], num_items_in_batch)
        logits = logits_of(model, self._inputs(batch))
        loss = self.recipe.loss(logits, batch)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _share_of_step(self, labels: Tensor, counted: Tensor | int | None) -> Tensor | float:
        """What a batch weighs among those that a step accumulates, times their number: by its labels, which the Trainer
        counts where tokens may be masked."""
        if counted is None:
            return 1.0
        shown = labels[..., 1:] if self._loss_shifts_labels else labels
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return shown.ne(IGNORED).sum() / max(counted, 1) * self.current_gradient_accumulation_steps * processes

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's. Raises JointoptError for data that can be gone through but once."""
        if not isinstance(eval_dataset, str | None):
            _check_repeatable("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def prediction_step(self, model: nn.Module, *args: Any, **options: Any) -> Any:
        """The Trainer's, with adapters where there are some."""
        whole: Any = self.supernet.model
        return super().prediction_step(with_adapters(whole).eval() if adapted(whole) else model, *args, **options)

    def _sorted(self, step: int) -> bool:
        """Whether this step has sorted already, for an earlier one of the batches that it accumulates."""
        done, self._last_sorted = self._last_sorted == step, step
        return done

    def _inner_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _labelled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its labels under the one name that losses know."""
        name = next((n for n in self.label_names if inputs.get(n) is not None), None)
        if name is None:
            raise JointoptError(f"train: a batch has no {self.label_names[0]!r}; found {', '.join(inputs)}")
        return {**self._inputs(inputs), "labels": inputs[name]}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's, of the largest sub-network; where it evaluates, the losses of the smallest and of a middle one
        (`SearchSpace.middle`) beside, so that callbacks (early stopping) see them too, as "eval_smallest_loss" and
        "eval_middle_loss": of names that end in "loss" the Trainer itself knows that less is better."""
        with without_cache(self.supernet.model):
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if description == "Evaluation":
                self._add_losses(found.metrics, dataloader, metric_key_prefix)
        return found

    def _add_losses(self, metrics: dict[str, Any], dataloader: Any, prefix: str) -> None:
        """Those of the smallest and of a middle sub-network."""
        if f"{prefix}_loss" not in metrics:
            raise JointoptError(
                f"evaluate: found no sample with {' or '.join(self.label_names)}; allowed: one or more (predict "
                "needs none)"
            )
        space = self.supernet.space
        for name, genome in (("smallest", space.smallest), ("middle", space.middle)):
            metrics[f"{prefix}_{name}_loss"] = self._loss_of(genome, dataloader)

    @torch.no_grad()
    def _loss_of(self, genome: np.ndarray, dataloader: Any) -> float:
        """Of a sub-network in its number formats where these are trained, otherwise unquantized; all processes'."""
        supernet = self.supernet
        view = supernet.training_view(genome, self.recipe.precision_from is not None).eval()
        if has_batch_norm(view) and not np.array_equal(genome, supernet.space.largest):
            reestimate(view, supernet.samples)
        total = torch.zeros(3, dtype=torch.float64)
        for inputs in dataloader:
            batch = self._once(self._labelled(self._prepare_inputs(inputs)))
            if not len(batch["labels"]):
                continue
            with self.accelerator.autocast():
                loss = self.recipe.loss(logits_of(view, self._inputs(batch)), batch)
            count = len(batch["labels"])
            seen = [float(loss) * count, count, self.recipe.counts(batch["labels"])]
            total += torch.tensor(seen, dtype=total.dtype)
        total = self.accelerator.reduce(total.float().to(self.args.device), "sum")
        if not total[2]:
            raise JointoptError(f"evaluate: no label counts, each is {IGNORED}; allowed: some that do")
        return float(total[0] / total[1])

    def _once(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the samples by which accelerate fills up the last batches, so that all processes have as many."""
        state, count = self.accelerator.gradient_state, len(batch["labels"])
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        left = max(state.remainder - self.accelerator.process_index * count, 0)
        of_samples = {n for n, each in batch.items() if isinstance(each, Tensor) and each.dim() and len(each) == count}
        return {name: each[:left] if name in of_samples else each for name, each in batch.items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's. A checkpoint that cannot be written whole is removed: training resumes from the one before."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with writing_all(folder):
                super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """With adapters as part of the weights, and at the end, to vouch for them, what a resumed training must have in
        common."""
        model: Any = self.supernet.model
        if state_dict is None and adapted(model):
            state_dict = with_adapters(model).state_dict()
        folder = Path(output_dir or self.args.output_dir)
        with writing_all(folder):
            if self.args.should_save:
                (folder / RECORD).unlink(missing_ok=True)
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                write_beside(folder, self._record(), self._added())

    def _added(self) -> dict[str, Tensor]:
        """Parameters that the model's own class does not know: adapters and learned ranges; and weights with adapters,
        which are saved together."""
        layers = adapted(self.supernet.model).items()
        found: dict[str, Tensor] = {
            f"{path}.{name}": layer.get_parameter(name) for path, layer in layers for name in ("weight", *ADAPTERS)
        }
        if self.recipe.learned_ranges and self.supernet.learned is not None:
            found |= self.supernet.learned.tensors()
        return found

    def _record(self) -> dict[str, Any]:
        """What a resumed training must have in common."""
        return {
            "space": self.supernet.space.to_dict(),
            "leaving": self.supernet.leaving,
            "added": sorted(self._added()),
            "trained": self._began_with,
        }

    def _load_best_model(self) -> None:
        """Loads it like any checkpoint: the Trainer would look for names as they are in memory, and skip all others."""
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.supernet.model, resume_from_checkpoint, self._record(), self._added())
        self.supernet.weights_changed()


def _check_repeatable(name: str, dataset: Any) -> None:
    if iter(dataset) is iter(dataset):
        raise JointoptError(
            f"{name}: found a {type(dataset).__name__} that can be gone through once; allowed: one whose __iter__ "
            "begins anew each time, as a generator function does"
        )
