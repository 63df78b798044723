"""The parser of the command line: Lightning's, with errors of one line."""

import re
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser

from mmtx.data.storage import scrub
from mmtx.data.yaml_check import check_yaml
from mmtx.errors import InputError

SOURCES = ("train", "validation", "test")  # options of `data` that are lists of `DataSource`
# Beginnings of lines in jsonargparse's messages that carry no information about the value.
NOISE = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value", "Subclass types expect",
         "a class path (str)", "a dict with")
STOCK_YAML = jsonargparse.get_loader("yaml")


class Parser(LightningArgumentParser):
    """Lightning's parser with one-line errors, instead of a page of options and a tree of all types that were tried."""

    strict = False  # whether null is refused; of all parsers, since those of nested classes are made by jsonargparse

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a nested parser, whose message the outer one quotes
            super().error(message, ex)
        raise input_error_in(ex) or InputError(one_line(message)) from None

    def validate(self, namespace: jsonargparse.Namespace, **options: Any) -> None:  # type: ignore[override]
        """As jsonargparse does; within `refuse_null`, null is a value only of types that include it.

        Not of a group of options, either, as one whose lines are all commented out has.
        """
        super().validate(namespace, **options, skip_unset=not Parser.strict)
        for name in self.groups if Parser.strict else ():
            if namespace.get(name, "") is None:
                raise TypeError(f'Parser key "{name}":\n  expected its options, or no such key. Got value: None')

    def refuse_null(self, config: jsonargparse.Namespace) -> None:
        """Raise InputError for a parsed configuration with null for a value that must be one."""
        Parser.strict = True  # of nested parsers, too
        try:
            self.validate(config)
        except TypeError as error:
            self.error(str(error), error)
        finally:
            Parser.strict = False


def one_line(message: str) -> str:
    """A message of jsonargparse, reduced to the key, the value found and what was expected."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if keys[-1:] and keys[-1] in SOURCES and "DataSource'" not in message:  # otherwise one source is wrong
        given = scrub(re.findall(r"(?:Got value: |\bval=|class_path (?='))(.*)", message)[-1].rstrip(":)"))
        return f"{'.'.join(keys)}: found {given:.80}, expected a list of sources, as in [{{paths: [FILE]}}]"
    found = re.findall(r"(?:Got|Given) value: (?!NestedArg|Namespace)(.*)", message)
    facts = re.sub(r"Parser key \"[^\"]+\":|\. Got value: .*|Expected a <class 'NoneType'>", "", message)
    facts = re.sub(r"Expected a (?:typing\.)?", "expected ", re.sub(r"<class '([^']+)'>", r"\1", facts))
    lines = [line.strip(" -") for line in facts.splitlines()]
    told = [f"found {value}" for value in found[:1] if len(value) < 80]
    told += [line for line in lines if line and not line.startswith(NOISE)]
    return scrub(": ".join(filter(None, [".".join(keys), ", ".join(told)])))


def refused(message: str) -> str:
    """A message of jsonargparse, reduced to the reason why a class rejects its arguments."""
    noise = (*NOISE, "Expected a ", "Not a valid subclass")
    lines = (line.strip(" -") for line in message.splitlines())
    return scrub("; ".join(line for line in lines if line and not line.startswith(noise)))


def input_error_in(error: BaseException | None) -> InputError | None:
    """The InputError that `error` wraps, since jsonargparse wraps errors of constructors."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def load_yaml(text: str) -> Any:
    """Check and read YAML: of files, of files that these name, and of values on the command line."""
    if text == "None":  # what jsonargparse makes of null on the command line for a field of a field, as model.optimizer.muon_lr
        return None
    check_yaml(text, "configuration")
    return STOCK_YAML(text)
