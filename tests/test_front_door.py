"""The front door is small and frozen: a change here is a change for every user."""

import nmgraph


def test_front_door_is_what_the_design_names():
    assert nmgraph.__all__ == [
        "METHODS",
        "NMGraphError",
        "Pattern",
        "accelerate",
        "attach",
        "convert",
        "export",
        "finalize",
        "hardware",
        "inspect",
        "load",
        "manifest",
        "record",
        "report",
        "save",
        "sensitivity",
        "verify",
    ]
    assert all(hasattr(nmgraph, name) for name in nmgraph.__all__)


def test_export_and_report_stay_functions_after_their_packages_are_imported():
    from nmgraph.export.bundle import write_bundle
    from nmgraph.export.proof import verify_onnx
    from nmgraph.report.html import write_page

    assert callable(nmgraph.export)
    assert callable(write_bundle)
    assert callable(verify_onnx)
    assert callable(nmgraph.report)
    assert callable(write_page)
