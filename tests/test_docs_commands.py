"""The commands of README.md and of the documentation run as written, on small inputs."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dupr_cli.recipe import EvaluateRecipe, StudyRecipe, load_recipe
from tests.support.command_line import dupr
from tests.support.named_inputs import NamedInputs, smallest
from tests.support.recipes import SMALL_DETECTOR, SMALL_NETWORK
from tests.support.weights import make_run, random_weights

ROOT = Path(__file__).parents[1]
# Parts of commands that want a server, a cluster or a package; these tests run their like.
ELSEWHERE = {
    "--download": "tests/prepare/test_download.py",
    "hf://": "tests/prepare/test_sources.py",
    "--engine ray": "tests/cli/test_prepare.py",
    "--nnodes": "tests/pretrain/test_distributed.py",
    "s3://": "tests/artifacts/test_remote.py",
    "https://": "tests/artifacts/test_remote.py",
    "--track": "tests/pretrain/test_trackers.py",
}
RESNET18 = "model.backbone=resnet18"
RESNET = ["detector.backbone=resnet18", "detector.roi_size=4", "detector.rois_per_image=8"]
SEMANTIC = [
    "semantic.short_side=64", "semantic.channels=16", "train.iterations=2", "train.batch_size=2",
    "train.workers=0", "train.warmup=0", "train.milestones=[]", "test.precise_bn_batches=1",
]  # fmt: skip
KEYPOINTS = [f"test.keypoint_sigmas={[0.05] * 17}", f"data.keypoint_flips={[*range(17)]}"]
# Keys beside SMALL_DETECTOR that make a protocol small.
OF_RECIPE = {
    "voc0712-r50c4-24k": RESNET,
    "coco-maskrcnn-r50c4-1x": [*RESNET, "detector.mask_roi_size=4"],
    "cityscapes-instance": [*RESNET, "detector.mask_roi_size=4"],
    "coco-keypoint-tiny": KEYPOINTS,
    "rtdetr-r50-coco-72e": [
        "detector.backbone=resnet18",
        "detector.query.queries=30",
        "detector.query.denoising=10",
        "detector.query.width=64",
    ],
}
# Commands whose runs must have a ResNet.
NETWORKS = {
    "--check fasterrcnn_resnet50_fpn": "resnet50",
    "model.init=runs/": "resnet18",
    **dict.fromkeys(
        ("r50c4", "cityscapes-instance", "rtdetr-r50", "--to torchvision", "-r voc-tiny"),
        "resnet18",
    ),
}


def network_of(line: str) -> str:
    if line.startswith("dupr evaluate voc") and "-r " not in line and "--frozen" not in line:
        return "resnet18"  # of voc-tiny
    return next((network for part, network in NETWORKS.items() if part in line), "")


def lines_of(page: str, first: str = "") -> list[str]:
    """Every dupr command in the blocks of a page that begin with these words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    text = "".join(block for block in blocks if block.startswith(first)).replace("\\\n", "")
    # The threads of this process are set already, so that variables for them change nothing.
    lines = [re.sub(r"^[A-Z_]+=\d+ (?=dupr )", "", line) for line in text.splitlines()]
    return [line for line in lines if line.startswith("dupr ")]


def overrides(keys: list[str]) -> list[str]:
    return [word for key in keys for word in ("--set", key)]


def of_study(name: str) -> list[str]:
    study = load_recipe(StudyRecipe, name)
    tuned = any(protocol.recipe == "voc-tiny" for protocol in study.protocols.values())
    network = RESNET18 if tuned else SMALL_NETWORK
    methods = {
        method: {
            "recipe": str(of.recipe),
            "set": [*of.set, *smallest(str(of.recipe)), "train.steps=4", network],
        }
        for method, of in [*study.methods.items()][:2]
    }
    keys = [f"methods={json.dumps(methods)}", "pretrain_seeds=[0]"]
    for protocol in study.protocols:
        small = json.dumps([*SMALL_DETECTOR, "test.score_threshold=0.0"])
        few = (f"set={small}", "labels=[4, all]", "seeds=2")
        keys += [f"protocols.{protocol}.{key}" for key in few]
    return overrides(keys)


def briefly(words: list[str], network: str) -> list[str]:
    """What is added to keep a command to seconds; nothing that is written is taken away."""
    cpu = ["--device", "cpu"]
    match words:
        case ["plan", *_]:
            return ["--seconds", "1", *cpu]
        case ["bench", recipe, *_]:
            return [*overrides([*smallest(recipe), network]), "--seconds", "1", *cpu]
        case ["pretrain", recipe, *_]:
            keys = [*smallest(recipe), *([] if "model.backbone" in " ".join(words) else [network])]
            keys.append("train.compile=false")
            return [*overrides(keys), "--steps", "4", "--nproc", "1", *cpu]
        case ["study", recipe, *_]:
            return [*of_study(recipe), *cpu]
        case ["evaluate", "knn" | "linear" | "patch-retrieval" | "voc07-cls", *_]:
            return cpu
        case ["evaluate", protocol, *_] if protocol not in ("detections", "report"):
            recipe = words[words.index("-r") + 1] if "-r" in words else ""
            few = ["--seeds", "1", "--nproc", "1"]
            if "--labels" in words:
                labels = words[words.index("--labels") + 1]
                few += ["--labels", "2,all" if "," in labels else "4"]
            if "--iterations" in words:
                few += ["--iterations", "2"]
            keys = SEMANTIC if protocol == "semantic" else SMALL_DETECTOR
            return [*overrides([*keys, *OF_RECIPE.get(recipe, [])]), *few, *cpu]
    return []


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> NamedInputs:
    return NamedInputs(tmp_path_factory.mktemp("cache"))


class Reader:
    """Somebody who types the commands of a page into a shell, one after the other."""

    def __init__(self, folder: Path, inputs: NamedInputs, network: str = SMALL_NETWORK) -> None:
        self.folder, self.inputs, self.network = folder, inputs, network
        self.written: dict[str, list[str]] = {}

    def type(self, line: str) -> None:
        """Run a command; what it reads is made first."""
        line = line.replace("$SLURM_ARRAY_TASK_ID/64", "1/1")
        command, _, pipe = line.partition(" | ")
        command, _, file = command.partition(" > ")
        words = shlex.split(command, comments=True)[1:]
        outputs = self._outputs(words)
        network = network_of(line)
        for word in words[1:]:
            if word not in outputs:
                name = word.removeprefix("model.init=").rstrip("/")
                self.inputs.make(name, self.folder, network)
                if network:
                    self.written.pop(word, None)
        for place, word in enumerate(words):
            if "*" in word:
                words[place : place + 1] = [path.name for path in self.folder.glob(word)]
        differs = words[:2] == ["checkpoint", "diff"]  # of two runs: it says so by its exit code
        done = dupr(*words, *briefly(words, self.network), code=int(differs))
        if pipe:
            value = json.loads(done.stdout)
            for key in pipe.removeprefix("jq .").split("."):
                value = value[key]
        if file:
            (self.folder / file).write_text(done.stdout)

    def _outputs(self, words: list[str]) -> set[str]:
        """Where a command writes. Pages show other ways to make a thing under the same name: what
        another command has made is taken away.
        """
        outputs = {words[n + 1] for n, word in enumerate(words) if word in ("--out", "--write")}
        if words[0] == "prepare" and words[1] not in ("merge", "verify", "stats", "view"):
            outputs.add(words[2])
        for output in outputs:
            place = self.folder / output
            if place.is_file():
                place.unlink()
            elif words[0] == "prepare" or self.written.get(output) != words[:2]:
                shutil.rmtree(place, ignore_errors=True)
            self.written[output] = words[:2]
        return outputs


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_path_from_photographs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: NamedInputs, page: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stages = lines_of(page, "dupr prepare photos/")
    assert [line.split()[1] for line in stages][:5] == [
        "prepare", "plan", "pretrain", "export", "evaluate",
    ]  # fmt: skip
    reader = Reader(tmp_path, inputs, RESNET18)
    for line in stages:
        reader.type(line)
    evaluate = shlex.split(stages[4])
    results = tmp_path / evaluate[evaluate.index("--out") + 1]
    assert "AP50" in (results / "table.txt").read_text()


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_what_runs_elsewhere_has_its_tests(place: str) -> None:
    assert (ROOT / place).is_file()


PAGES = {
    "benchmarks": 14, "command-line": 2, "evaluate": 12, "evidence": 4, "how-to": 21, "inspect": 11,
    "licence": 1, "metrics": 3, "prepare": 15, "probes": 4, "recipes": 1, "report": 2, "study": 4,
    "training": 8, "trouble": 14,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: NamedInputs, page: str
) -> None:
    """But for those that a page before it has too."""
    monkeypatch.chdir(tmp_path)
    for block in re.findall(
        r"```yaml\n(stage: study\n.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL
    ):
        (tmp_path / "mine.yaml").write_text(block)
    lines = lines_of(f"docs/{page}.md")
    assert len(lines) >= PAGES[page]
    before = itertools.takewhile(lambda name: name != page, PAGES)
    seen = {line for name in before for line in lines_of(f"docs/{name}.md")}
    # Exports of a ResNet are a file, of other networks a folder.
    exports = any("dupr export" in line for line in lines)
    reader = Reader(tmp_path, inputs, RESNET18 if exports else SMALL_NETWORK)
    for line in lines:
        if line not in seen and not any(part in line for part in ELSEWHERE):
            reader.type(line)


def commands_of_recipes(stage: str) -> dict[str, str]:
    """The command in the second line of every shipped recipe, by the recipe's name."""
    files = sorted((ROOT / "recipes" / stage).glob("*.yaml"))
    return {path.stem: path.read_text().splitlines()[1].removeprefix("#").strip() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("line", commands_of_recipes("pretrain").values())
def test_the_command_of_a_pretraining_recipe_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: NamedInputs, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Reader(tmp_path, inputs).type(line)


@pytest.mark.slow
def test_the_commands_of_evaluation_recipes_make_their_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: NamedInputs
) -> None:
    """tests/evaluate trains the detectors; here every recipe meets data of its layout."""
    monkeypatch.chdir(tmp_path)
    lines = commands_of_recipes("evaluate")
    recipes = {name: load_recipe(EvaluateRecipe, name) for name in lines}
    backbones = {
        name: recipe.detector.backbone.replace("auto", "resnet18")
        for name, recipe in recipes.items()
    }
    random_weights(tmp_path / "backbone.safetensors")
    made = ""
    for name in sorted(lines, key=backbones.__getitem__):
        words = shlex.split(lines[name])[1:]
        if made != backbones[name]:
            made = backbones[name]
            shutil.rmtree(tmp_path / "RUN", ignore_errors=True)
            make_run(tmp_path / "RUN", made)
        for word in words[1:]:
            if word != "eval":
                inputs.make(word, tmp_path)
        few = ["--labels", "4"] if isinstance(recipes[name].data.labels, list) else []
        if name == "yolo-keypoint-tiny":  # the set at hand has 3 keypoints, not a person's 17
            few += ["--set", "test.keypoint_sigmas=[0.05, 0.1, 0.1]"]
        plan = dupr(*words, *few, "--nproc", "1", "--dry-run", "--json")
        assert json.loads(plan.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("line", commands_of_recipes("probe").values())
def test_the_command_of_a_probe_makes_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: NamedInputs, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    for word in words[1:]:
        if word != "eval":
            inputs.make(word, tmp_path)
    assert json.loads(dupr(*words, "--dry-run", "--json").stdout)
