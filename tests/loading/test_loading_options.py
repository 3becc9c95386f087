"""Loading copies no weights needlessly, and the options of from_pretrained work as in every transformers model."""

import shutil
from pathlib import Path

import pytest
import torch

from conftest import IS_V5, load, repo_class, run_interpreter

# --------------------------------------------------------------------------------------------------- mapped, not copied


def mapped_regions(folder: Path) -> list[range]:
    """The addresses at which this process has mapped the shards of `folder`."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors") and str(folder) in line:
            first, last = line.split()[0].split("-")
            regions.append(range(int(first, 16), int(last, 16)))
    return regions


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "auto"}, {"torch_dtype": torch.bfloat16}])
@pytest.mark.parametrize("part", ["joint", "contrastive", "text"])
def test_weights_are_mapped_not_copied(flat, tmp_path, options, part):
    own = shutil.copytree(flat, tmp_path / "own")
    if part == "text":
        model_class = repo_class("modeling_internvl.InternVLTextModelWithProjection")
        model = model_class.from_pretrained(own, **options)
    else:
        model = load(own, **options, **({"contrastive_only": True} if part == "contrastive" else {}))
    regions = mapped_regions(own)
    copied = [
        name
        for name, parameter in model.named_parameters()
        if not any(parameter.data_ptr() in region for region in regions)
    ]
    assert regions and copied == []


def test_no_weight_is_initialised_before_it_is_loaded(flat, monkeypatch):
    def refuse(self, *args, **kwargs):
        if self.device.type != "meta":
            raise AssertionError("a weight was initialised")
        return self

    for name in ("normal_", "uniform_", "zero_", "fill_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    load(flat, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.bfloat16 if IS_V5 else torch.float32),  # 4.57 loads float32 by default
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"low_cpu_mem_usage": True, "dtype": "auto"}, torch.bfloat16),
    ],
)
def test_dtypes(flat, options, dtype):
    model = load(flat, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == dtype


def test_the_path_may_be_a_keyword_argument(flat):
    """By the name of transformers' argument."""
    model_class = repo_class("modeling_internvl.InternVLModel")
    named = model_class.from_pretrained(pretrained_model_name_or_path=flat, dtype="auto")
    assert torch.equal(named.itm_head.weight, model_class.from_pretrained(flat, dtype="auto").itm_head.weight)


@pytest.fixture(scope="module")
def hub_cache(flat, tmp_path_factory):
    """A cache folder with the layout of huggingface_hub and two revisions: `main` has the weights at its root; `old`
    has another `logit_scale`, and also the checkpoint in a subfolder.
    """
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("hub")
    repository = root / "hub" / "models--someone--internvl"
    for revision, commit in (("main", "a" * 40), ("old", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(flat, repository / "snapshots" / commit)
    old = repository / "snapshots" / ("b" * 40)
    for shard in old.glob("*.safetensors"):
        tensors = load_file(shard)
        if "logit_scale" in tensors:
            tensors["logit_scale"] = torch.tensor(3.0, dtype=torch.bfloat16)
            save_file(tensors, shard, metadata={"format": "pt"})
    for path in old.glob("*.*"):
        if path.suffix != ".py":
            (old / "part").mkdir(exist_ok=True)
            shutil.copy(path, old / "part" / path.name)
    return root


def test_repository_id_revision_and_subfolder_without_network(hub_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(hub_cache))
    code = """
from transformers import AutoConfig, AutoModel, AutoProcessor
name, here = "someone/internvl", {"trust_remote_code": True, "local_files_only": True}
for where in ({}, {"revision": "main"}, {"revision": "old"}, {"revision": "b" * 40},
              {"revision": "old", "subfolder": "part"}):
    model = AutoModel.from_pretrained(name, dtype="auto", **here, **where)
    config = AutoConfig.from_pretrained(name, **here, **where)
    processor = AutoProcessor.from_pretrained(name, **here, **where)
    print(round(float(model.logit_scale.detach()), 2), config.model_type, type(processor).__name__)
    checked = AutoModel.from_pretrained(
        name, dtype="auto", **here, **where, device_map="auto", max_memory={"cpu": "3MB"}, offload_folder="offload"
    )
    assert float(checked.config.clip_embed_dim) == 128
try:
    AutoModel.from_pretrained(name, revision="missing", **here)
except OSError:
    print("no such revision")
"""
    lines = run_interpreter(code, tmp_path).stdout.splitlines()
    fresh, old = lines[0], "3.0 internvl_14b InternVLProcessor"
    assert fresh.endswith("internvl_14b InternVLProcessor") and fresh != old
    assert lines == [fresh, fresh, old, old, old, "no such revision"]
