"""Standard output belongs to the JSON object; progress is quiet where nobody watches."""

import json
import os

from penjing.cli.screen import Screen


def test_nothing_but_the_object_reaches_standard_output(capfd):
    screen = Screen(json_wanted=True)
    with screen.guarding_stdout():
        print("a library prints")
        os.write(1, b"native code prints\n")
        os.system("echo a child prints")
        screen.say("for people")
        screen.emit({"a": 1})
    out, err = capfd.readouterr()
    assert json.loads(out) == {"a": 1}
    assert all(w in err for w in ("a library prints", "native code prints", "a child prints", "for people"))


def test_standard_output_is_given_back(capfd):
    with Screen().guarding_stdout():
        pass
    print("mine again")
    assert capfd.readouterr().out == "mine again\n"


def test_json_holds_what_json_can_say(capfd):
    Screen(json_wanted=True).emit({"nan": float("nan"), "list": (1.0, float("inf")), "text": "Größe"})
    assert json.loads(capfd.readouterr().out) == {"nan": None, "list": [1.0, None], "text": "Größe"}


def test_without_json_nothing_is_emitted(capfd):
    Screen().emit({"a": 1})
    assert capfd.readouterr().out == ""


def test_a_large_object_arrives_whole(capfd):
    screen = Screen(json_wanted=True)
    with screen.guarding_stdout():
        screen.emit({"x": "y" * 300_000})
    assert len(json.loads(capfd.readouterr().out)["x"]) == 300_000


def test_short_tasks_are_silent_without_a_terminal(capfd):
    screen = Screen()
    with screen.task("work", 3) as advance, screen.task("inner") as inner:
        advance(1)
        inner(1)
    assert capfd.readouterr() == ("", "")


def test_markup_in_names_is_not_read_as_markup(capfd):
    screen = Screen()
    screen.line("a[red]b[/]")
    screen.note("[bold]c")
    assert capfd.readouterr().err == "a[red]b[/]\n[bold]c\n"


def test_tasks_on_a_terminal_end_cleanly(capfd):
    screen = Screen()
    screen.console._force_terminal = True
    try:
        with screen.task("outer", 2) as outer, screen.task("inner [x]", None) as inner:
            outer(1)
            inner(5)
            raise ValueError
    except ValueError:
        pass
    assert screen._bars is None and not screen._tasks


def test_details_stand_beside_the_innermost_bar(capfd):
    screen = Screen()
    screen.console._force_terminal = True
    screen.detail("before any bar")
    with screen.task("outer", 2) as outer, screen.task("inner", 4) as inner:
        screen.detail("loss 0.5 [x]")
        outer(1), inner(2)
        rows = {task.description: task.fields["detail"] for task in screen._bars.tasks}
    assert rows == {"outer": "", "inner": r"loss 0.5 \[x]"}
