//! Clients that prove who they are, whatever the relay asks for, and the users that they say they are.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
};

use walrelay::{
    access::{Permission, Secret, User, Users},
    protocol::{
        backend::{self, ServerError},
        frontend::{FirstPacket, Message, Password, Startup},
        md5::password_reply,
        scram::{ChannelBinding, ChannelBindingPolicy, Client as ScramClient, Verifier},
    },
};

use crate::support::Client;

pub(crate) fn scram_secret(password: &str) -> Secret {
    let iterations = NonZeroU32::new(4096).unwrap();
    Secret::Scram(Verifier::from_password(password.as_bytes(), vec![3; 16], iterations))
}

/// A user who may stream.
pub(crate) fn user(secret: Option<Secret>) -> User {
    User {
        secret,
        may: [Permission::Stream].into_iter().collect(),
        valid_until: None,
        connection_limit: None,
        member_of: BTreeSet::new(),
    }
}

pub(crate) fn users<const N: usize>(all: [(&str, User); N]) -> Users {
    Users::new(all.into_iter().map(|(name, user)| (name.to_owned(), user)).collect::<BTreeMap<_, _>>())
}

pub(crate) fn startup_of(user: &str, replication: &str) -> Startup {
    Startup::new([("user", user), ("database", "shop"), ("replication", replication)])
}

/// How a relay begins.
#[derive(Debug, PartialEq)]
pub(crate) enum Asked {
    Nothing,
    Md5([u8; 4]),
    Scram(Vec<String>),
}

/// Says who it is, and what the relay asks for.
pub(crate) async fn begin(client: &mut Client, startup: Startup) -> Result<Asked, ServerError> {
    client.send_packet(&FirstPacket::Startup(startup)).await;
    match client.receive().await {
        Some(backend::Message::Authentication(backend::Authentication::Ok)) => Ok(Asked::Nothing),
        Some(backend::Message::Authentication(backend::Authentication::Md5Password(salt))) => {
            Ok(Asked::Md5(salt))
        }
        Some(backend::Message::Authentication(backend::Authentication::Sasl(offered))) => {
            Ok(Asked::Scram(offered))
        }
        Some(backend::Message::ErrorResponse(error)) => Err(error),
        other => panic!("{other:?}"),
    }
}

/// Logs in for physical replication; returns how it was asked for its password.
pub(crate) async fn log_in(client: &mut Client, user: &str, password: &str) -> Result<Asked, ServerError> {
    log_in_with(client, startup_of(user, "true"), password).await
}

pub(crate) async fn log_in_with(
    client: &mut Client,
    startup: Startup,
    password: &str,
) -> Result<Asked, ServerError> {
    let user = startup.user().unwrap().to_owned();
    let asked = begin(client, startup).await?;
    match &asked {
        Asked::Nothing => {}
        Asked::Md5(salt) => {
            let reply = password_reply(&user, password.as_bytes(), *salt);
            client.send(&Message::Password(Password::of_text(reply))).await;
        }
        Asked::Scram(offered) => {
            assert_eq!(offered, &["SCRAM-SHA-256"]);
            prove_by_scram(client, offered, password).await?;
        }
    }
    ready(client).await.map(|()| asked)
}

async fn prove_by_scram(client: &mut Client, offered: &[String], password: &str) -> Result<(), ServerError> {
    let scram =
        ScramClient::new(password.as_bytes(), ChannelBinding::Unsupported, ChannelBindingPolicy::Prefer);
    let (first, state) = scram.start(offered, [7; 18]).unwrap();
    let initial = Password::of_sasl_initial(first.mechanism, first.message.as_bytes());
    client.send(&Message::Password(initial)).await;
    let Some(backend::Message::Authentication(backend::Authentication::SaslContinue(data))) =
        client.receive().await
    else {
        panic!("no SASL continue")
    };
    let (state, reply) = state.handle(&data).unwrap();
    client.send(&Message::Password(Password::of_sasl(reply.into_bytes()))).await;
    match client.receive().await {
        Some(backend::Message::Authentication(backend::Authentication::SaslFinal(data))) => {
            state.handle(&data).unwrap();
            Ok(())
        }
        Some(backend::Message::ErrorResponse(error)) => Err(error),
        other => panic!("{other:?}"),
    }
}

/// Everything up to the first ReadyForQuery, or the error that comes instead.
async fn ready(client: &mut Client) -> Result<(), ServerError> {
    loop {
        match client.receive().await.expect("closed") {
            backend::Message::ReadyForQuery(_) => return Ok(()),
            backend::Message::ErrorResponse(error) => return Err(error),
            _ => {}
        }
    }
}

/// Code and text.
pub(crate) fn said(error: &ServerError) -> (&str, &str) {
    (error.sqlstate.as_ref().map_or("", |sqlstate| sqlstate.as_str()), error.message.as_str())
}
