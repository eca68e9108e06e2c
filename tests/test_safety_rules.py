"""Nothing that a file brings along is run: no unpickling, no code of a checkpoint's own, no text as code."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.modeling_utils
import transformers.trainer

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*(ROOT / "llava").rglob("*.py"), *(ROOT / "scripts_italian").rglob("*.py"), ROOT / "train_alternating.py"]
)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNS_TEXT = {"exec", "eval", "compile", "__import__"}
MUST_SAY = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
YAML_LOADERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}


def find_dangers(tree: ast.AST) -> Iterator[str]:
    """What in a source could run something that a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in UNPICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            yield from (f"from {node.module} import {a.name}" for a in node.names if a.name != "UnpicklingError")
        elif isinstance(node, ast.Call):
            yield from find_dangers_of_call(node)


def find_dangers_of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    said = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
    if name in RUNS_TEXT or name in YAML_LOADERS:
        yield f"{name}()"
    if name in MUST_SAY and said.get(MUST_SAY[name][0]) is not MUST_SAY[name][1]:
        yield f"{name}() without {MUST_SAY[name][0]}={MUST_SAY[name][1]}"
    owner, _, method = name.rpartition(".")
    builds = method in ("from_pretrained", "from_config") and owner.split(".")[-1].startswith("Auto")
    if builds and said.get("trust_remote_code") is not False:
        yield f"{name}() without trust_remote_code=False"
    if said.get("trust_remote_code") is True or said.get("shell") is True:
        yield f"{name}() trusts what it is given"


def test_no_source_runs_what_a_file_holds() -> None:
    assert len(SOURCES) > 50, "the library's files are not found"
    breaches = [
        f"{path.relative_to(ROOT)}: {danger}"
        for path in SOURCES
        for danger in find_dangers(ast.parse(path.read_bytes()))
    ]
    assert breaches == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "exec(text)",
        "x = eval(text)",
        "yaml.load(text)",
        "AutoTokenizer.from_pretrained(path)",
        "transformers.AutoModel.from_config(config)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "model_class.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_sees_a_breach(source: str) -> None:
    assert list(find_dangers(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import UnpicklingError",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(text)",
        "AutoConfig.from_pretrained(path, trust_remote_code=False)",
        "model_class.from_pretrained(path)",
    ],
)
def test_the_check_lets_pass_what_is_safe(source: str) -> None:
    assert list(find_dangers(ast.parse(source))) == []


def test_transformers_reads_checkpoints_as_plain_tensors() -> None:
    # A resumed run has transformers read the optimizer, the scheduler and the random states.
    calls = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(inspect.getsource(transformers.trainer)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls)
    for function in (
        transformers.modeling_utils.load_state_dict,
        transformers.modeling_utils.PreTrainedModel.from_pretrained,
    ):
        assert inspect.signature(function).parameters["weights_only"].default is True
