"""ElasticTrainer in several processes: all ranks train the same sub-networks, and the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.elastic_trainers import assert_trained_alike
from tests.zoo import batches, make

ROOT = Path(__file__).parents[1]
BEGIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
from safetensors.torch import save_file
from jointopt import ElasticTrainer, Recipe, SearchSpace
from jointopt.training.sampling import Sandwich
from tests.elastic_trainers import arguments, trainer, weights
from tests.test_trainer_processes import image_rows, masked_rows
from tests.zoo import make
folder, backend = Path(sys.argv[1]), "gloo" if sys.argv[2] == "2" else None
"""
END = """
made.train()
found = weights(made)
if made.supernet.learned is not None:
    found["ranges"] = made.supernet.learned.values
save_file({k: v.contiguous() for k, v in found.items()}, folder / f"rank{made.args.process_index}.safetensors")
"""


def trained(folder: Path, script: str, processes: int) -> list[dict[str, torch.Tensor]]:
    """The weights of every process after a script that makes a trainer, `made`."""
    folder.mkdir()
    (folder / "script.py").write_text(BEGIN + script + END)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "script.py", str(folder), str(processes)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.parametrize("options", ["", ", precision_from=0.0, learned_ranges=True"], ids=["weights", "and ranges"])
def test_two_processes_train_as_one_with_all_of_the_batch(tmp_path, options):
    def script(size: int) -> str:
        return (
            f"made = trainer(folder, recipe=Recipe(Sandwich(1){options}), per_device_train_batch_size={size},\n"
            "               max_steps=3, ddp_backend=backend)\n"
        )

    first, second = trained(tmp_path / "two", script(4), 2)
    (one,) = trained(tmp_path / "one", script(8), 1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert ("ranges" in first) == bool(options) and (not options or first["ranges"].any())
    assert_trained_alike(first, one)


def test_two_processes_whose_labels_count_differently_train_the_same_weights(tmp_path):
    first, second = trained(
        tmp_path / "two",
        "model = make('llama_tied')\n"
        "options = {'max_steps': 2, 'per_device_train_batch_size': 1, 'ddp_backend': backend}\n"
        "made = ElasticTrainer(model=model, space=SearchSpace.for_model(model, schemes=['none', 'W8A8']),\n"
        "                      args=arguments(folder, **options), train_dataset=masked_rows())\n",
        2,
    )
    before = make("llama_tied").state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in first.items() if name in before)


def test_two_processes_keep_the_same_statistics_of_normalizations(tmp_path):
    first, second = trained(
        tmp_path / "two",
        "model = make('resnet')\n"
        "options = {'max_steps': 2, 'per_device_train_batch_size': 3, 'ddp_backend': backend}\n"
        "made = ElasticTrainer(model=model, space=SearchSpace.for_model(model, schemes=['none', 'W8A8']),\n"
        "                      args=arguments(folder, **options), train_dataset=image_rows())\n",
        2,
    )
    before = make("resnet").state_dict()
    means = [name for name in first if name.endswith("running_mean")]
    assert means and all(not torch.equal(first[name], before[name]) for name in means)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_losses_of_smaller_sub_networks_count_each_sample_once(tmp_path):
    trained(
        tmp_path / "two",
        "made = trainer(folder, max_steps=1, per_device_eval_batch_size=2, ddp_backend=backend)\n"
        "rows = made.eval_dataset[:3]\n"  # of which accelerate hands out the first twice
        "found = made.evaluate(rows)\n"
        "space = made.supernet.space\n"
        "images, labels = torch.stack([row['pixel_values'] for row in rows]), [row['labels'] for row in rows]\n"
        "for name, genome in (('smallest', space.smallest), ('middle', space.middle)):\n"
        "    logits = made.supernet.training_view(genome, False).eval()(images).logits\n"
        "    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()\n"
        "    assert abs(found[f'eval_{name}_loss'] - expected) < 1e-5, (name, found, expected)\n",
        2,
    )


def test_processes_with_other_weights_are_refused(tmp_path):
    trained(
        tmp_path / "two",
        "import pytest\n"
        "from jointopt import JointoptError, elastic_loss\n"
        "from tests.zoo import batches\n"
        "made = trainer(folder, max_steps=1, ddp_backend=backend)\n"
        "made.supernet.model.classifier.bias.data += made.args.process_index\n"
        "images = batches('vit')[0]\n"
        "batch = {**images, 'labels': torch.zeros(len(images['pixel_values']), dtype=torch.long)}\n"
        "with pytest.raises(JointoptError, match='the processes hold super-networks of other weights'):\n"
        "    elastic_loss(made.supernet, batch, 0)\n"
        "made.supernet.model.classifier.bias.data -= made.args.process_index\n",
        2,
    )


def test_a_training_of_one_process_is_refused_in_two(tmp_path):
    trained(
        tmp_path / "two",
        "import pytest\n"
        "from jointopt import JointoptError, train_supernet\n"
        "made = trainer(folder, recipe=Recipe(Sandwich(1)), max_steps=1, ddp_backend=backend)\n"
        "with pytest.raises(JointoptError, match='found 2 processes of torch.distributed'):\n"
        "    train_supernet(made.supernet, [], 1)\n",
        2,
    )


def image_rows() -> list[dict]:
    images = batches("resnet", 1, 12)[0]["pixel_values"]
    return [{"pixel_values": image, "labels": at % 5} for at, image in enumerate(images)]


def masked_rows() -> list[dict]:
    """Of every second sample a quarter of the labels count."""
    rows = []
    for at, ids in enumerate(batches("llama_tied", 1, 8)[0]["input_ids"]):
        labels = ids.clone()
        if at % 2:
            labels[: 3 * len(ids) // 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows
