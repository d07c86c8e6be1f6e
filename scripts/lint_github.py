"""Lints what GitHub reads of a folder (default: this project): workflows, forms, CITATION.cff. Asks no network.

    python scripts/lint_github.py [FOLDER]

check-jsonschema holds them against the schemas that it brings, zizmor looks for what an outsider could misuse.
"""

import subprocess
import sys
from pathlib import Path

SCHEMAS = {  # files: what check-jsonschema calls their schemas
    ".github/workflows/*.yml": ("vendor.github-workflows", "custom.github-workflows-require-timeout"),
    ".github/ISSUE_TEMPLATE/*.yml": ("vendor.github-issue-forms",),
    ".github/ISSUE_TEMPLATE/config.yml": ("vendor.github-issue-config",),
    ".github/dependabot.yml": ("vendor.dependabot",),
    "CITATION.cff": ("vendor.citation-file-format",),
}


def main(folder: Path) -> int:
    commands = [[Path(sys.executable).with_name("zizmor"), "--offline", "--quiet", folder / ".github"]]
    for pattern, schemas in SCHEMAS.items():
        files = [path for path in sorted(folder.glob(pattern)) if path.name != "config.yml" or "config" in pattern]
        if not files:
            sys.exit(f"{folder}: expected files {pattern}, there is none")
        commands += [[sys.executable, "-m", "check_jsonschema", "--builtin-schema", x, *files] for x in schemas]
    runs = [subprocess.run(command, capture_output=True, text=True) for command in commands]
    failed = [run for run in runs if run.returncode]
    for run in failed:
        print(run.stdout + run.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:]) if sys.argv[1:] else Path(__file__).parents[1]))
