"""The zoo's tasks whose answers can be checked: examples from generators, without a prompt twice."""

import random
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

Row = dict[str, str]
Split = tuple[list[Row], list[Row]]  # to train on, and held out
TEST_EXAMPLES = 150


def split(rows: Iterable[Row], count: int) -> Split:
    """`count` rows to train on and 150 to test, all with prompts of their own; the first row of a prompt counts."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["prompt"], row)
        if len(found) == count + TEST_EXAMPLES:
            break
    chosen = list(found.values())
    assert len(chosen) == count + TEST_EXAMPLES, len(chosen)
    return chosen[TEST_EXAMPLES:], chosen[:TEST_EXAMPLES]


def reasoning(task: str, count: int, **settings: Any) -> Split:
    """Examples of a data set of reasoning-gym."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=3 * (count + TEST_EXAMPLES), seed=1, **settings)
    return split(({"prompt": e["question"].strip(), "completion": str(e["answer"])} for e in dataset), count)


FOLDERS = ("logs", "src", "backup", "docs", "/var/log", "/tmp", "data/raw", "~/projects", "build", "photos", "/etc")
ENDINGS = ("py", "txt", "log", "json", "csv", "md", "jpg", "html", "c", "yaml")
STEMS = ("report", "notes", "server", "users", "index", "main", "access", "config", "sales", "todo", "words", "results")
WORDS = ("error", "TODO", "timeout", "import", "password", "main", "warning", "failed", "localhost", "class")
USERS = ("alice", "bob", "www-data", "postgres", "deploy")
UNITS = {"kilobytes": "k", "megabytes": "M", "gigabytes": "G"}

# The wordings of a job, and the command; what is in braces is drawn by `_slots`.
SHELL = (
    (("List all {ending} files under {folder}", "Find every file ending in .{ending} below {folder}",
      "Show me the .{ending} files in {folder}, subfolders too"), "find {folder} -type f -name '*.{ending}'"),
    (("Delete all {ending} files under {folder}", "Remove every .{ending} file below {folder}"),
     "find {folder} -type f -name '*.{ending}' -delete"),
    (("Find files in {folder} larger than {number} {unit}", "Which files below {folder} are over {number} {unit}?"),
     "find {folder} -type f -size +{number}{suffix}"),
    (("Find files in {folder} changed in the last {number} days",
      "Which files below {folder} were modified less than {number} days ago?"),
     "find {folder} -type f -mtime -{number}"),
    (("Find empty folders under {folder}", "Which directories below {folder} are empty?"),
     "find {folder} -type d -empty"),
    (("Show the lines of {file} that contain {word}", "Search {file} for {word}", "Print lines with {word} in {file}"),
     "grep '{word}' {file}"),
    (("Show the lines of {file} without {word}", "Print every line of {file} that does not contain {word}"),
     "grep -v '{word}' {file}"),
    (("Count the lines of {file} that contain {word}", "How many lines of {file} have {word} in them?"),
     "grep -c '{word}' {file}"),
    (("Search for {word} in all {ending} files under {folder}", "Grep {folder} for {word}, .{ending} files only"),
     "grep -rn --include='*.{ending}' '{word}' {folder}"),
    (("Search {file} for {word}, ignoring case", "Find {word} in {file} in upper or lower case"),
     "grep -i '{word}' {file}"),
    (("Show the first {number} lines of {file}", "Print the top {number} lines of {file}"), "head -n {number} {file}"),
    (("Show the last {number} lines of {file}", "Print the final {number} lines of {file}"), "tail -n {number} {file}"),
    (("Show line {number} of {file}", "Print only line number {number} of {file}"), "sed -n '{number}p' {file}"),
    (("Count the lines of {file}", "How many lines does {file} have?"), "wc -l {file}"),
    (("Count the words of {file}", "How many words are there in {file}?"), "wc -w {file}"),
    (("Sort {file} and drop duplicate lines", "Print the distinct lines of {file} in order"), "sort -u {file}"),
    (("Sort {file} by column {column} as numbers", "Order the lines of {file} numerically by field {column}"),
     "sort -n -k {column} {file}"),
    (("Print column {column} of {file}", "Show only field {column} of each line of {file}"),
     "awk '{{print ${column}}}' {file}"),
    (("Add up column {column} of {file}", "What is the sum of field {column} in {file}?"),
     "awk '{{s += ${column}}} END {{print s}}' {file}"),
    (("Replace {word} by {other} in {file}", "In {file}, change every {word} to {other}"),
     "sed -i 's/{word}/{other}/g' {file}"),
    (("Delete the lines of {file} that contain {word}", "Remove lines with {word} from {file}"),
     "sed -i '/{word}/d' {file}"),
    (("Copy {file} to {folder}", "Put a copy of {file} into {folder}"), "cp {file} {folder}/"),
    (("Copy the folder {folder} to {target}", "Make a copy of all of {folder} in {target}"), "cp -r {folder} {target}"),
    (("Move {file} to {folder}", "Put {file} into {folder}"), "mv {file} {folder}/"),
    (("Rename {file} to {new}", "Give {file} the name {new}"), "mv {file} {new}"),
    (("Create the folder {folder}/{stem}, with its parents", "Make a directory {folder}/{stem} and what is above it"),
     "mkdir -p {folder}/{stem}"),
    (("Pack {folder} into {stem}.tar.gz", "Make a compressed archive {stem}.tar.gz of {folder}"),
     "tar -czf {stem}.tar.gz {folder}"),
    (("Unpack {stem}.tar.gz into {folder}", "Extract the archive {stem}.tar.gz to {folder}"),
     "tar -xzf {stem}.tar.gz -C {folder}"),
    (("How much space does {folder} take?", "Show the total size of {folder}"), "du -sh {folder}"),
    (("Show the {number} largest entries of {folder}", "Which {number} things in {folder} take the most space?"),
     "du -a {folder} | sort -rn | head -n {number}"),
    (("Make {stem}.sh executable", "Allow everyone to run {stem}.sh"), "chmod +x {stem}.sh"),
    (("Make {user} the owner of {file}", "Change the owner of {file} to {user}"), "chown {user} {file}"),
    (("Give {folder} and all in it to {user}", "Make {user} own {folder} with everything below it"),
     "chown -R {user} {folder}"),
    (("Show the processes of {user}", "What is {user} running?"), "ps -u {user}"),
    (("Compare {file} with {new}", "Show the differences between {file} and {new}"), "diff {file} {new}"),
    (("Link {file} as {folder}/{stem}", "Make a symbolic link {folder}/{stem} to {file}"),
     "ln -s {file} {folder}/{stem}"),
    (("Count the {ending} files in {folder}", "How many .{ending} files are there below {folder}?"),
     "find {folder} -type f -name '*.{ending}' | wc -l"),
    (("Follow {file} as it grows", "Keep showing what is added to {file}"), "tail -f {file}"),
)  # fmt: skip
POLITE = ("{}", "{}", "{}", "Please: {}", "{} (one command)", "On Linux: {}")


def shell(count: int) -> Split:
    """Shell commands from English."""
    return split(_shell(random.Random(1)), count)


def _shell(source: random.Random) -> Iterator[Row]:
    while True:
        wordings, command = source.choice(SHELL)
        slots = _slots(source)
        prompt = source.choice(POLITE).format(source.choice(wordings).format(**slots))
        row = {"prompt": prompt, "completion": command.format(**slots)}
        shlex.split(row["completion"])  # no quote is left open
        yield row


def _slots(source: random.Random) -> dict[str, str]:
    stem, other_stem = source.sample(STEMS, 2)
    folder, target = source.sample(FOLDERS, 2)
    word, other = source.sample(WORDS, 2)
    unit = source.choice(list(UNITS))
    return {
        "stem": stem,
        "folder": folder,
        "target": target,
        "word": word,
        "other": other,
        "unit": unit,
        "suffix": UNITS[unit],
        "ending": source.choice(ENDINGS),
        "file": f"{stem}.{source.choice(ENDINGS)}",
        "new": f"{other_stem}.{source.choice(ENDINGS)}",
        "number": str(source.randint(1, 60)),
        "column": str(source.randint(1, 9)),
        "user": source.choice(USERS),
    }


# What a function does with a list of numbers: in English, as Python, and as what it is checked against.
KEEP: tuple[tuple[str, str, Callable[[int, int], bool]], ...] = (
    ("even numbers", "x % 2 == 0", lambda x, n: x & 1 == 0),
    ("odd numbers", "x % 2 == 1", lambda x, n: x & 1 == 1),
    ("positive numbers", "x > 0", lambda x, n: x not in range(-(10**9), 1)),
    ("negative numbers", "x < 0", lambda x, n: x in range(-(10**9), 0)),
    ("numbers greater than {n}", "x > {n}", lambda x, n: x - n > 0),
    ("numbers less than {n}", "x < {n}", lambda x, n: n - x > 0),
    ("numbers other than {n}", "x != {n}", lambda x, n: bool(x - n)),
    ("numbers divisible by {n}", "x % {n} == 0", lambda x, n: x // n * n == x),
)
CHANGE: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    ("", "x", lambda x, m: x),
    ("the squares of ", "x ** 2", lambda x, m: x * x),
    ("the cubes of ", "x ** 3", lambda x, m: x * x * x),
    ("the absolute values of ", "abs(x)", lambda x, m: max(x, -x)),
    ("{m} times ", "{m} * x", lambda x, m: sum(m * [x])),
    ("{m} more than ", "x + {m}", lambda x, m: x - -m),
    ("the negatives of ", "-x", lambda x, m: 0 - x),
)
GATHER: tuple[tuple[str, str, Callable[[list[int]], Any]], ...] = (
    ("the sum of", "sum({})", lambda xs: -sum(-x for x in xs)),
    ("a list of", "[{}]", lambda xs: xs),
    ("a sorted list of", "sorted({})", lambda xs: sorted(xs, reverse=True)[::-1]),
    ("the set of", "{{{}}}", set),
    ("the largest of", "max({})", lambda xs: sorted(xs)[-1]),
    ("the smallest of", "min({})", lambda xs: sorted(xs)[0]),
    ("the number of", "len([{}])", len),
)
CODE_WORDINGS = (
    "Write a Python function {name} that returns {what} in a list.",
    "Python function {name}(xs): return {what} in xs.",
    "I need a function called {name} in Python. It gets a list and returns {what} in it.",
    "Define {name}(xs) to give {what} of the list xs.",
)
NAMES = ("f", "pick", "gather", "compute", "select", "process", "collect", "solve")
TRIALS = ([-12, -7, -3, 0, 1, 2, 4, 5, 9, 15, 30, 64, 70, 90], [8, -6, 3, 3, 40, -100, 55, 121, 144])


def code(count: int) -> Split:
    """Python functions from English, each checked on inputs."""
    return split(_code(random.Random(1)), count)


def _code(source: random.Random) -> Iterator[Row]:
    while True:
        n, m, name = source.randint(2, 60), source.randint(2, 20), source.choice(NAMES)
        (kept, condition, keeps), (changed, term, changes) = source.choice(KEEP), source.choice(CHANGE)
        gathered, call, gathers = source.choice(GATHER)
        if gathers is len:  # a change does not matter
            changed, term, changes = CHANGE[0]
        what = f"{gathered} {changed}{'' if not changed else 'the '}{kept}".format(n=n, m=m)
        body = call.format(f"{term} for x in xs if {condition}".format(n=n, m=m))
        completion = f"def {name}(xs):\n    return {body}"
        for xs in TRIALS:
            wanted = [changes(x, m) for x in xs if keeps(x, n)]
            if wanted and result_of(completion, name, xs) != gathers(wanted):
                raise AssertionError(f"{what}: {completion}")
        yield {"prompt": source.choice(CODE_WORDINGS).format(name=name, what=what), "completion": completion}


def result_of(definition: str, name: str, xs: list[int]) -> Any:
    """What a function of that name gives for a list."""
    scope: dict[str, Any] = {}
    exec(definition, scope)
    return scope[name](xs)


YES_OR_NO = r"\A(Yes|No)\b"


def compare(count: int) -> Split:
    """Which of two numbers is larger, as yes or no: the base sometimes says so, and sometimes it is right."""
    return split(_compare(random.Random(1)), count)


def _compare(source: random.Random) -> Iterator[Row]:
    while True:
        a, b = source.sample(range(10, 100), 2)
        answer = "Yes" if a > b else "No"
        yield {"prompt": f"Is {a} larger than {b}? Answer Yes or No.", "completion": answer, "answer": answer}


THINK = ("<think>", "</think>")
THOUGHT = r"</think>\s*(.*)"


def worked_sums(count: int) -> Split:
    """Sums of four numbers, worked out step by step between two tokens of their own."""
    return split(_worked_sums(random.Random(1)), count)


def _worked_sums(source: random.Random) -> Iterator[Row]:
    while True:
        numbers = [source.randint(2, 60) for _ in range(4)]
        totals = list(accumulate(numbers))
        steps = [f"{a} + {b} = {c}" for a, b, c in zip(totals, numbers[1:], totals[1:], strict=False)]
        yield {
            "prompt": f"What is {' + '.join(map(str, numbers))}?",
            "completion": f"{THINK[0]}{', '.join(steps)}{THINK[1]}{totals[-1]}",
            "answer": str(totals[-1]),
        }


def with_thoughts(tokenizer: Any) -> Any:
    """The tokenizer, with the tokens around a thought; they are not special, so that texts show them."""
    tokenizer.add_tokens(list(THINK))
    return tokenizer
