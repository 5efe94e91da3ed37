//! Who may use which command.
//!
//! Owns the table of commands and permissions, and the refusals. A command that a version does not know is SQL to it.

use crate::access::Permission;
use crate::downstream::{command::Session, connection::Stream, server::Server};
use crate::protocol::{Command, ServerError, SqlState};

/// Refuses a command that this session's user has no permission for. What is not permitted to anybody is not refused here.
pub(super) fn check<S: Stream>(session: &Session<'_, S>, command: &Command) -> Result<(), ServerError> {
    let has_database = session.database.is_some();
    match needed(command, &session.server, has_database) {
        Some(permission) if !session.may.has(permission) => {
            let user = &session.registration.client().user;
            let detail = format!(
                "User \"{user}\" does not have the permission \"{}\" on this relay.",
                permission.as_str()
            );
            let text = refusal(command, permission, &session.server);
            Err(ServerError::error(SqlState::INSUFFICIENT_PRIVILEGE, text).with_detail(detail))
        }
        _ => Ok(()),
    }
}

/// What a command takes; `None` for those that tell only what a client must know to go on.
fn needed(command: &Command, server: &Server, has_database: bool) -> Option<Permission> {
    // Without a database SQL is refused to everybody.
    let sql = has_database.then_some(Permission::Sql);
    match command {
        Command::IdentifySystem | Command::Show(_) => None,
        Command::TimelineHistory(_)
        | Command::CreateReplicationSlot(_)
        | Command::DropReplicationSlot { .. }
        | Command::StartReplication(_) => Some(Permission::Stream),
        Command::ReadReplicationSlot(_) if server.is_at_least(15) => Some(Permission::Stream),
        Command::AlterReplicationSlot { .. } if server.is_at_least(17) => Some(Permission::Stream),
        Command::BaseBackup(_) => Some(Permission::BaseBackup),
        Command::UploadManifest if server.is_at_least(17) => Some(Permission::BaseBackup),
        Command::Sql(_)
        | Command::ReadReplicationSlot(_)
        | Command::AlterReplicationSlot { .. }
        | Command::UploadManifest => sql,
    }
}

/// PostgreSQL's words where it knows the refusal.
fn refusal(command: &Command, permission: Permission, server: &Server) -> &'static str {
    let is_about_slot = matches!(
        command,
        Command::CreateReplicationSlot(_)
            | Command::DropReplicationSlot { .. }
            | Command::ReadReplicationSlot(_)
            | Command::AlterReplicationSlot { .. }
    );
    match permission {
        Permission::Stream if is_about_slot && server.is_at_least(16) => {
            "permission denied to use replication slots"
        }
        Permission::Stream if is_about_slot => {
            "must be superuser or replication role to use replication slots"
        }
        Permission::Stream => no_walsender(server),
        Permission::BaseBackup => "permission denied to take a base backup",
        Permission::Sql => "permission denied to execute SQL",
        Permission::Admin => "permission denied to use the admin console",
    }
}

/// Said to whom no replication connection is of any use.
pub(in crate::downstream) fn no_walsender(server: &Server) -> &'static str {
    if server.is_at_least(16) {
        "permission denied to start WAL sender"
    } else {
        "must be superuser or replication role to start walsender"
    }
}
