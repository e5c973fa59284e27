"""Records, from a clone of upstream's repository, what people could write in any of its releases.

    python tests/compat/record_history.py <clone> [<folder of an unpacked wheel>=<tag> ...]

It writes history.json beside itself: `uses`, the names that its documentation, notebooks, examples and commands import
from each module, with the number of files that do; `arguments`, of each config, script and trainer the arguments that
it ever had, with the first and the last release of each. No line of its code is kept.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

PLACE = Path(__file__).with_name("history.json")
WRITTEN = re.compile(r"(docs|examples|nbs|scripts|trl/commands|trl/scripts|trl/skills)/|README")
IMPORT = re.compile(r"^[ \t>]*from[ \t]+(trl[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE)


def git(clone, *words):
    done = subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True, errors="replace", check=True)
    return done.stdout


def source(clone, tag, path):
    text = git(clone, "show", f"{tag}:{path}")
    if path.endswith(".ipynb"):
        try:
            return "\n".join("".join(cell.get("source", [])) for cell in json.loads(text)["cells"])
        except ValueError:
            return ""
    return text


def imported(text):
    for module, names in IMPORT.findall(text):
        for name in re.sub(r"#[^\n]*", "", names).strip("()").replace("\\", "").split(","):
            word = name.strip().partition(" as ")[0].partition(";")[0].strip("` ")
            if re.fullmatch(r"\w+", word):
                yield module, word


def arguments(text):
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(("Config", "Arguments", "Trainer")):
            continue
        if node.name == "BaseTrainer":  # two classes of that name
            continue
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and not node.name.endswith("Trainer"):
                yield node.name, each.target.id
            elif isinstance(each, ast.FunctionDef) and each.name == "__init__" and node.name.endswith("Trainer"):
                yield from ((node.name, one.arg) for one in [*each.args.args[1:], *each.args.kwonlyargs])


def record(clone, wheels):
    uses, known = defaultdict(set), defaultdict(dict)

    def take(tag, text):
        for cls, name in arguments(text):
            known[cls].setdefault(name, [tag, tag])[1] = tag

    for tag in git(clone, "tag", "--sort=v:refname").split():
        for path in git(clone, "ls-tree", "-r", "--name-only", tag).splitlines():
            if WRITTEN.match(path) and path.endswith((".py", ".md", ".mdx", ".ipynb")):
                for module, name in imported(source(clone, tag, path)):
                    uses[module, name].add(path)
            if path.startswith("trl/") and path.endswith(".py") and not path.endswith("vllm_serve.py"):
                take(tag, source(clone, tag, path))
    for folder, tag in wheels:
        for path in sorted(Path(folder, "trl").rglob("*.py")):
            take(tag, path.read_text(encoding="utf-8"))
    return {
        "uses": {" ".join(key): len(paths) for key, paths in sorted(uses.items())},
        "arguments": {cls: dict(sorted(names.items())) for cls, names in sorted(known.items())},
    }


if __name__ == "__main__":
    made = record(sys.argv[1], [word.split("=") for word in sys.argv[2:]])
    PLACE.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
