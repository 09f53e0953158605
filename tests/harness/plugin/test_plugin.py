"""How lm-eval finds this package in fresh interpreters: today's release, and a later one.

That later release does not exist yet, so ``later_release`` replaces the parts of it that discovery
uses: a registry with ``load_plugins``, which reads entry points on first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lm_eval_bh
from lm_eval_bh.harness.plugin import registration
from lm_eval_bh.resources import shipped

ROOT = Path(__file__).resolve().parents[3]


def python(code: str, *paths: Path, **variables: str) -> str:
    """Run code in a fresh interpreter that sees this checkout, and return what it prints."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# As at the start of Python where the package is installed: the finder is there, and nothing else.
INSTALL = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location(
    "_lm_eval_bh_startup", {str(ROOT / "lm_eval_bh" / "harness" / "plugin" / "startup.py")!r}
)
startup = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(startup)
startup.install()
"""
PLACEHOLDER = "lm_eval_bh.harness.model:BHLM"
SHOW = """
from lm_eval.api.registry import model_registry
print(dict(model_registry.items()).get("hf-bh"), len(model_registry) > 30)
"""


def test_starting_imports_nothing():
    added = python(
        "import importlib.util, sys\nsys.modules.pop('_lm_eval_bh_startup', None)\n"
        f"before = set(sys.modules)\n{INSTALL}\n"
        "print(set(sys.modules) - before)"
    )
    assert added == "{'_lm_eval_bh_startup'}"


def test_finder_serves_the_import_of_lm_eval():
    shown = python(INSTALL + "assert 'lm_eval_bh' not in sys.modules\nimport lm_eval.models" + SHOW)
    assert shown == f"{PLACEHOLDER} True"


def test_import_of_the_package_before_lm_eval():
    assert python("import lm_eval_bh, lm_eval.models" + SHOW) == f"{PLACEHOLDER} True"


def test_import_of_the_package_after_lm_eval():
    code = "import lm_eval.models, lm_eval.tasks, lm_eval_bh" + SHOW
    assert python(code) == f"{PLACEHOLDER} True"


def test_registry_loads_the_builtin_models_too():
    """It loads them only while it is empty, so our placeholder must not be the first there."""
    code = """
    import lm_eval.api.registry as registry, lm_eval_bh
    assert len(registry.model_registry) == 0
    print(registry.get_model("dummy").__name__, "hf-bh" in registry.model_registry)
    """
    assert python(code) == "DummyLM True"


def test_registering_again_changes_nothing():
    code = """
    import sys
    import lm_eval.models, lm_eval.tasks
    from lm_eval_bh.harness.plugin.activation import activate
    from lm_eval_bh.harness.plugin import startup
    init = lm_eval.tasks.TaskManager.__init__
    finders = len(sys.meta_path)
    for _ in range(3):
        activate()
    print(lm_eval.tasks.TaskManager.__init__ is init, len(sys.meta_path) == finders)
    """
    assert python(code) == "True True"


def test_there_is_one_finder():
    code = INSTALL + (
        "finders = list(sys.meta_path)\nimport lm_eval_bh\nprint(sys.meta_path == finders)"
    )
    assert python(code) == "True"


def test_two_installations_do_not_ask_each_other_for_ever():
    code = (
        INSTALL + INSTALL + "assert len([f for f in sys.meta_path if 'startup' in repr(f)]) > 1\n"
    )
    assert python(code + "import lm_eval.models" + SHOW) == f"{PLACEHOLDER} True"


def test_looking_for_a_module_is_not_importing_it():
    code = """
    import importlib.util, sys
    print(importlib.util.find_spec("lm_eval.models").name, "lm_eval.models" in sys.modules)
    import lm_eval.models
    """
    assert python(INSTALL + textwrap.dedent(code) + SHOW).splitlines() == [
        "lm_eval.models False",
        f"{PLACEHOLDER} True",
    ]


def test_lm_eval_runs_when_the_package_is_gone():
    """The checkout of an editable installation may be deleted."""
    code = INSTALL + (
        "sys.path = [p for p in sys.path if p != ROOT]\n"
        "sys.modules['lm_eval_bh'] = None  # what import finds in its place\n"
        "import lm_eval.models, lm_eval.tasks.manager"
    )
    assert python(f"ROOT = {str(ROOT)!r}\n" + code + SHOW) == "None True"


def test_the_package_loads_no_torch():
    code = """
    import sys, lm_eval_bh
    print({"torch", "lm_eval", "transformers", "numpy"} & set(sys.modules))
    """
    assert python(code) == "set()"


def test_every_exported_name_exists():
    assert set(lm_eval_bh.__all__) == set(dir(lm_eval_bh))
    assert len([getattr(lm_eval_bh, name) for name in lm_eval_bh.__all__]) > 10
    with pytest.raises(AttributeError, match=r"'lm_eval_bh' has no attribute 'no_such_name'"):
        lm_eval_bh.no_such_name  # noqa: B018


# The folder of the 14,000 stock tasks takes 20 s to index: one folder of them stands for all.
FEW_TASKS = """
import logging, pathlib, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")  # warnings count
import lm_eval_bh
import lm_eval.tasks.manager as manager
manager.__file__ = str(pathlib.Path(manager.__file__).parent / "wikitext" / "any.py")
"""


def tasks_of(arguments: str, prelude: str = "") -> str:
    return python(
        FEW_TASKS + prelude + f"tm = manager.TaskManager({arguments})\n"
        "print(*tm.all_tasks, tm.include_path)"
    )


OURS = (
    "bh_demo bh_demo_hellaswag bh_demo_lambada bh_demo_wikitext bh_hellaswag bh_lambada bh_suite "
    "bh_wikitext"
)


@pytest.fixture
def users_tasks(tmp_path) -> Path:
    (tmp_path / "mine.yaml").write_text("task: a_task\ndataset_path: text\n")
    return tmp_path


def test_tasks_are_there_without_include_path():
    assert tasks_of("") == f"{OURS} wikitext None"


def test_tasks_are_there_with_include_path_in_every_form(users_tasks):
    path = str(users_tasks)
    forms = f"{path!r}, [{path!r}], ({path!r},), pathlib.Path({path!r})"
    shown = python(
        f"{FEW_TASKS}for form in {forms}:\n    tm = manager.TaskManager(include_path=form)\n"
        "    print(*tm.all_tasks, tm.include_path)"
    ).splitlines()
    assert len(shown) == 4
    for line in shown:
        assert line.startswith(f"a_task {OURS} wikitext ")
        assert path in line


def test_include_path_may_be_given_by_position(users_tasks):
    assert tasks_of(f"None, {str(users_tasks)!r}").startswith(f"a_task {OURS} wikitext ")


def test_our_own_folder_given_as_include_path():
    """It is indexed once: the harness would warn of every task that overrides another."""
    shown = tasks_of(f"include_path={str(shipped('tasks'))!r}")
    assert shown == f"{OURS} wikitext {shipped('tasks')}"


def test_a_folder_around_ours_given_as_include_path():
    around = str(shipped("tasks").parent)
    assert registration._with_our_tasks(around) == around


def test_without_the_defaults_there_is_only_what_was_asked_for(users_tasks):
    arguments = f"include_path={str(users_tasks)!r}, include_defaults=False"
    assert tasks_of(arguments) == f"a_task {users_tasks}"
    assert tasks_of("include_defaults=False") == "None"


def test_a_users_task_wins(users_tasks):
    (users_tasks / "other.yaml").write_text("task: bh_wikitext\ndataset_path: text\n")
    code = (
        FEW_TASKS + "logging.disable()\n"
        f"tm = manager.TaskManager(include_path={str(users_tasks)!r})\n"
        "print(tm.task_index['bh_wikitext'].yaml_path.name)"
    )
    assert python(code) == "other.yaml"


def test_a_damaged_installation_does_not_stop_lm_eval():
    prelude = (
        "import lm_eval_bh.resources as r\nr.PACKAGE = pathlib.Path('nowhere', 'lm_eval_bh')\n"
    )
    warning, tasks = tasks_of("", prelude).splitlines()
    assert warning.endswith("reinstall the package.")
    assert tasks == "wikitext None"


LATER_RELEASE = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/registry.py": """
        import importlib.metadata as md
        class Registry(dict):
            def register(self, alias, target):
                assert alias not in self
                self[alias] = target
        model_registry: Registry = Registry()
        def load_plugins(group, registry):
            for entry_point in md.entry_points(group=group):
                if entry_point.name not in registry:
                    registry.register(entry_point.name, target=entry_point)
        def get_model(name):
            import lm_eval.models
            load_plugins("lm_eval.models", model_registry)
            return model_registry[name]
    """,
    "models/__init__.py": """
        from lm_eval.api.registry import model_registry
        model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
    """,
    "tasks/__init__.py": "from lm_eval.tasks.manager import TaskManager",
    "tasks/manager.py": """
        class TaskManager:
            def __init__(self, include_path=None, include_defaults=True, metadata=None):
                self.include_path = include_path
                self.indexed = include_path
    """,
}


@pytest.fixture
def later_release(tmp_path) -> Path:
    for name, code in LATER_RELEASE.items():
        file = tmp_path / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(code))
    # What the installation of our wheel leaves for importlib.metadata.
    info = tmp_path / "lm_eval_bh-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lm-eval-bh\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[lm_eval.models]\nhf-bh = {PLACEHOLDER}\n")
    return tmp_path


def test_later_release_takes_the_entry_point(later_release):
    code = """
    import lm_eval.models
    from lm_eval.api.registry import get_model, model_registry
    print("hf-bh" in model_registry, type(get_model("hf-bh")).__name__, get_model("hf-bh").value)
    """
    shown = python(INSTALL + textwrap.dedent(code), later_release)
    assert shown == f"False EntryPoint {PLACEHOLDER}"


def test_later_release_gets_the_tasks(later_release):
    code = """
    from lm_eval.tasks import TaskManager
    print(TaskManager().indexed, TaskManager().include_path)
    """
    shown = python(INSTALL + textwrap.dedent(code), later_release)
    assert shown == f"[{shipped('tasks')!r}] None"


def test_release_with_another_task_manager_is_left_alone(later_release):
    manager = later_release / "lm_eval" / "tasks" / "manager.py"
    manager.write_text("class TaskManager:\n    def __init__(self, folders=()):\n        pass\n")
    code = "\nfrom lm_eval.tasks import TaskManager\nprint(TaskManager.__init__.__qualname__)"
    assert python(INSTALL + code, later_release) == "TaskManager.__init__"
