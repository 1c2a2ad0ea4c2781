"""Findings as JUnit XML, which every CI shows: a suite for each checkpoint, a case for each figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree

from quantkit.report.check import Finding
from quantkit.report.words import figure_text


def junit(findings: Sequence[Finding]) -> str:
    root = ElementTree.Element("testsuites", name="quantkit", tests=str(len(findings)), failures=str(sum(each.has_failed for each in findings)))
    for name, group in groupby(findings, key=lambda finding: finding.checkpoint):
        cases = list(group)
        failures = str(sum(each.has_failed for each in cases))
        suite = ElementTree.SubElement(root, "testsuite", name=name, tests=str(len(cases)), failures=failures, errors="0", skipped="0")
        for each in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=f"quantkit.{name}", name=each.figure)
            if each.has_failed:
                ElementTree.SubElement(case, "failure", message=each.verdict).text = figure_text(each)
            else:
                ElementTree.SubElement(case, "system-out").text = figure_text(each)
    ElementTree.indent(root)
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)  # what XML cannot hold
