"""Enrollment and certificates of a federation:  anther keys COMMAND

    init [--host NAME …] [--port P]     create certificates for these names and addresses of this server
    ticket --holder NAME [--days 7]     print a ticket with which one device enrolls; it works once
    list                                list devices and open tickets
    revoke DEVICE|TICKET                exclude a device, or void a ticket, immediately, even while the server runs
    rotate [--host NAME …]              create a new key and certificate for the server, which presents them immediately

Devices trust the federation's own authority, whose key is FOLDER/authority.key: keep a copy elsewhere. With this key,
anyone can pose as this server; without it, certificates can't be renewed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from common.errors import REPORTED_ERRORS, AntherError, describe_error
from common.terminal import discard_output
from conf.schemas.server import ServerConfig
from protocol.ticket import Ticket
from server.gateway import pki
from server.gateway.device_registry import DeviceRegistry, ticket_name
from server.supervisor import server_dir
from server.supervisor.server_dir import ServerDir

DONE, USAGE = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status: USAGE, with one line on standard error, if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="anther keys", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("init", "ticket", "list", "revoke", "rotate"))
    parser.add_argument("device", nargs="?", help="with revoke: name of a device or an open ticket, as in the list")
    parser.add_argument("--folder", help="the federation's folder (server.folder; default: in ANTHER_HOME)")
    parser.add_argument("--host", nargs="+", default=[], help="names and addresses at which devices reach this server")
    parser.add_argument("--port", type=int, default=ServerConfig.port)
    parser.add_argument("--holder", help="with ticket: owner of the device")
    parser.add_argument("--days", type=float, default=7.0, help="with ticket: validity in days")
    options = parser.parse_args(arguments)
    try:
        print(_run(server_dir.of(options.folder), options))
    except BrokenPipeError:  # the reader of our output closed it
        discard_output()
        return USAGE
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return USAGE
    return DONE


def _run(directory: ServerDir, options: argparse.Namespace) -> str:
    if options.command == "init":
        directory.prepare(options.host, options.port)
        hosts = ", ".join(pki.hosts_of(directory.certificates.certificate.read_bytes()))
        return f"{directory.folder}: certificates for {hosts}. Keep a copy of authority.key elsewhere."
    registry = DeviceRegistry(directory.folder, per_holder=directory.address().per_holder)
    match options.command:
        case "ticket":
            if not options.holder:
                raise AntherError(
                    "ticket: add --holder, the device's owner: the number of devices per holder is limited"
                )
            return issue_ticket(directory, registry, options.holder, options.days)
        case "list":
            return list_devices(registry)
        case "revoke":
            if not options.device:
                raise AntherError("revoke: name a device or ticket; anther keys list shows all")
            was_enrolled = any(
                member.name == options.device for member in registry.snapshot().active_devices().values()
            )
            registry.revoke(options.device)
            if not was_enrolled:
                return f"{options.device} can no longer be used to enroll."
            return f"{options.device} is excluded from now on. Its earlier updates stay in the adapter."
        case _:
            directory.rotate(options.host)
            return "created a new certificate; a running server presents it immediately. Devices need no change."


def issue_ticket(directory: ServerDir, registry: DeviceRegistry, holder: str, days: float) -> str:
    """Create a ticket for one device.

    Args:
        directory: folder of the federation.
        registry: registry that stores the ticket.
        holder: owner of the device.
        days: validity.

    Raises:
        AntherError: `days` is not positive, or the holder has too many devices and tickets.
    """
    if not days > 0:
        raise AntherError(f"--days {days:g}: must be greater than 0")
    address = directory.address()
    host = f"[{address.host}]" if ":" in address.host else address.host
    return str(Ticket(f"{host}:{address.port}", registry.issue(holder, days=days), directory.fingerprint()))


def list_devices(registry: DeviceRegistry) -> str:
    """List devices and open tickets, one per line."""
    contents, now = registry.snapshot(), datetime.now(UTC).isoformat()
    lines = [
        f"{member.name}  of {member.holder}, since {member.since[:16]}"
        + (f", REVOKED {member.revoked[:16]}" if member.revoked else "")
        for member in contents.members.values()
    ]
    lines += [
        f"{ticket_name(hashed)}  open, of {ticket.holder}, until {ticket.expires[:16]}"
        for hashed, ticket in contents.tickets.items()
        if ticket.used_by is None and ticket.expires > now
    ]
    return "\n".join(lines) or "no devices, and no open tickets"


if __name__ == "__main__":
    sys.exit(main())
