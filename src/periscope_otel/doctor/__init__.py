"""What is well and what is not: settings, providers, servers, devices, with the remedy.

Example:
    >>> from periscope_otel.doctor import examine
    >>> for finding in examine().broken:
    ...     print(finding.check, finding.message, finding.remedy)
"""

from periscope_otel.doctor.examine import examine
from periscope_otel.doctor.finding import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "examine"]
