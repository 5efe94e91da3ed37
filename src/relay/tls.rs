//! The certificate that clients see, and its renewal while the relay runs.
//!
//! Owns the look at its files from time to time: whoever renews a certificate replaces files and may forget to say so. A
//! look, and no notice from the file system, because such files are often links that are exchanged as a whole.

use std::{sync::Arc, time::Duration};

use tracing::{error, info};

use crate::config;
use crate::conninfo::ProcessSurroundings;
use crate::metrics::DownstreamMetrics;
use crate::net::tls::{Reloaded, ServerTls};
use crate::relay::RelayError;
use crate::relay::reload::Part;

/// Reads the files for the first time.
pub(super) fn read(
    settings: &config::Tls,
    metrics: &DownstreamMetrics,
) -> Result<Arc<ServerTls>, RelayError> {
    let tls = ServerTls::read(settings, &ProcessSurroundings).map_err(RelayError::Tls)?;
    show_expiry(&tls, metrics);
    Ok(Arc::new(tls))
}

/// Reads them again when they have changed; what cannot be used is told once, and changes nothing. Never comes back.
pub(super) async fn watch(tls: Arc<ServerTls>, metrics: DownstreamMetrics) {
    let mut told = None;
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        let own = Arc::clone(&tls);
        let reloading = tokio::task::spawn_blocking(move || own.reload(&ProcessSurroundings));
        match reloading.await {
            Ok(Ok(reloaded)) => {
                told = None;
                if reloaded == Reloaded::Changed {
                    info!("TLS files have changed: new connections see the new certificate");
                    show_expiry(&tls, &metrics);
                }
            }
            Ok(Err(failure)) => {
                let text = failure.to_string();
                if told.as_ref() != Some(&text) {
                    error!(
                        error = text,
                        "TLS files have changed and cannot be used: what was read before stays"
                    );
                    told = Some(text);
                }
            }
            // The task panicked, which has told of itself.
            Err(_) => return,
        }
    }
}

/// The same files among those that are read again on request.
pub(super) fn part(tls: &Arc<ServerTls>, metrics: &DownstreamMetrics) -> Part {
    let (tls, metrics) = (Arc::clone(tls), metrics.clone());
    Box::new(move || {
        let renewed = tls.read_again(&ProcessSurroundings).map_err(|failure| failure.to_string())?;
        let (tls, metrics) = (Arc::clone(&tls), metrics.clone());
        Ok(Box::new(move || {
            if let Some(renewed) = renewed {
                tls.replace(renewed);
                show_expiry(&tls, &metrics);
            }
        }))
    })
}

fn show_expiry(tls: &ServerTls, metrics: &DownstreamMetrics) {
    // Seconds of this century are far below what a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    metrics.certificate_expires_at.set(tls.expires_at() as f64);
}

/// The files are looked at this often.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
