"""Loads the shared fixtures, and leaves out the tests whose packages only the checks in `.ci/run` install."""

import importlib.util

NEEDS = {
    "test_properties.py": "hypothesis",
    "test_roundtrips.py": "hypothesis",
    "test_desk.py": "hypothesis",
    "test_uploaded_shelves.py": "hypothesis",
    "test_writes.py": "hypothesis",
    "test_mail.py": "aiosmtpd",
    "test_docs.py": "jsonschema_rs",
    "test_event_data.py": "jsonschema_rs",
    "test_schema.py": "schemathesis",
    "data/schema_hooks.py": "schemathesis",
    "test_page.py": "axe_playwright_python",
    "test_page_desk.py": "axe_playwright_python",
    "test_page_shelf.py": "axe_playwright_python",
    "test_docs_page.py": "axe_playwright_python",
    "test_other_sites.py": "axe_playwright_python",
}
collect_ignore = [file for file, package in NEEDS.items() if importlib.util.find_spec(package) is None]
pytest_plugins = ["tests.fixtures", *(["tests.browser"] if "test_page.py" not in collect_ignore else [])]
